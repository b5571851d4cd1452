"""`python docs/try_errors.py > docs/errors.md`: make every mistake on purpose and write down what was said.

Commands run in forked processes that have the libraries loaded already, so it takes a few minutes. The full-disk case needs a small
file system: give its mount point with --small (on Linux, as root: mount -t tmpfs -o size=1m tmpfs DIR); without it that case is left out.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are loaded

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from afa import Ensemble
from afa.cli.main import main as afa
from afa.demo.draw import draw
from afa.experts.description import describe_config
from afa.experts.transformer_names import TRANSFORMERS
from afa.files import locked
from afa.places import ASSETS

SMALL = "--hidden 8 --heads 2 --batch-size 2 --steps 2 --device cpu"
TRAIN = f"afa train --experts demo:curves demo:angles --data data --output out {SMALL}"
DISTILL = "afa distill done --data data --output out --batch-size 4"
COMPARE = "afa evaluate --ensemble done --output out"
DRAW = "--prompt a --output out --steps 2"
BUSY = "busy"  # a folder that is locked meanwhile
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"

# group -> (what is wrong, command); everything is relative to a folder with the good and the broken things that prepare() makes
CASES = {
    "Experts": [
        ("A path that is not there", "afa inspect demo:curves curvs"),
        ("An embedded model that is not there", "afa inspect demo:curvs"),
        ("A hub id that is not in the cache, without a network", "afa inspect org/model@main"),
        ("A pickle instead of safetensors", "afa inspect old.ckpt"),
        ("A folder that is no model", "afa inspect data"),
        ("A file cut short", "afa inspect cut.safetensors"),
        ("A header that is null", "afa inspect null.safetensors"),
        ("A header with three offsets for a tensor", "afa inspect offsets.safetensors"),
        ("A LoRA given as an expert", "afa inspect lora.safetensors"),
        ("Weights cut short in a folder", "afa inspect cut"),
        ("Weights with a missing tensor in a folder", f"afa generate hole {DRAW}"),
        ("A text encoder with a missing tensor", f"afa generate mute {DRAW}"),
        ("A folder with pickles only", "afa inspect pickled"),
        ("A model_index.json that names a function", "afa inspect function"),
        ("NaN in an expert's weights", f"afa generate nan {DRAW}"),
        ("The same, merged", "afa merge --experts demo:curves nan --output out"),
        ("Weights in 4 bits, as ComfyUI stores them", "afa inspect nvfp4.safetensors --config mine"),
        ("The same, with the scales named otherwise", "afa inspect int8.safetensors --config mine"),
        ("A GGUF file cut short", "afa inspect cut.gguf"),
        ("A transformer's file cut short", "afa inspect cut-transformer.safetensors"),
        ("A transformer in 4 bits, as ComfyUI stores it", "afa inspect nvfp4-transformer.safetensors"),
        ("A LoRA of another family", f"afa generate demo:curves+flux-lora.safetensors {DRAW}"),
        ("A single file of an architecture that is not known", "afa inspect noise.safetensors"),
        ("A denoiser alone, and nobody to lend it the rest", f"afa generate alone {DRAW}"),
        ("A frame that is no pipeline", f"afa generate alone --frame data {DRAW}"),
        ("A text encoder that is not there", f"afa generate alone --text-encoder clip_l.safetensors {DRAW}"),
        ("A LoRA given as a text encoder", f"afa generate alone --text-encoder lora.safetensors --frame demo:curves {DRAW}"),
        ("A text encoder without a frame, for a U-Net of no known size", f"afa generate alone --text-encoder demo:curves/text_encoder {DRAW}"),
        ("A text encoder for experts that have theirs", f"afa generate demo:curves --text-encoder demo:curves/text_encoder {DRAW}"),
        ("A text encoder for a saved ensemble", f"afa generate done --text-encoder demo:curves/text_encoder {DRAW}"),
        ("A text encoder without experts", "afa inspect --config sd15 --text-encoder demo:curves/text_encoder"),
        ("A VAE for an expert that is not shown with one", "afa inspect demo:curves --vae demo:curves/vae"),
        ("A name that is a path", "afa inspect ../x=demo:curves demo:angles"),
        ("Two experts of one name", f"afa train --experts demo:curves demo:curves --data data --output out {SMALL}"),
        ("A LoRA file without tensors", f"afa generate demo:curves+empty.safetensors {DRAW}"),
        ("A LoRA of a kind that is not read", f"afa generate demo:curves+oft.safetensors {DRAW}"),
        ("A LoRA at a strength that is no number", f"afa generate demo:curves+lora.safetensors*nan {DRAW}"),
    ],
    "Experts that do not go together": [
        ("Experts of two architectures", "afa inspect demo:curves wide"),
        ("FLUX.2 dev and klein", "afa inspect flux2.safetensors klein.safetensors"),
        ("Z-Image and Lumina 2", "afa inspect z-image.safetensors lumina2.safetensors"),
        ("The same, on the way to training", f"afa train --experts demo:curves wide --data data --output out {SMALL}"),
        ("A file that is said to be distilled, beside a base pipeline", "afa inspect klein-base turbo.safetensors --config klein-turbo"),
        ("The same, with the base pipeline as frame", f"afa generate turbo.safetensors --config klein-turbo --frame klein-base {DRAW}"),
        ("Experts that predict different things", "afa inspect demo:curves epsilon"),
        ("A v-prediction file beside an ε-prediction file", "afa inspect velocity.safetensors noise.safetensors --config epsilon"),
        ("A noise schedule rescaled to zero signal", "afa inspect demo:curves rescaled"),
        ("A noise schedule given as a table", "afa inspect demo:curves tabled"),
    ],
    "Training": [
        ("No data folder", TRAIN.replace("--data data", "--data nowhere")),
        ("A folder without captions", TRAIN.replace("--data data", "--data empty")),
        ("Captions missing everywhere", TRAIN.replace("--data data", "--data silent")),
        ("Images missing or broken everywhere", TRAIN.replace("--data data", "--data broken")),
        ("Images outside the data's folder", TRAIN.replace("--data data", "--data outside")),
        ("Pictures that claim to be enormous", TRAIN.replace("--data data", "--data bombs")),
        ("Too few images", TRAIN.replace("--data data", "--data few")),
        ("Data of no known form", TRAIN.replace("--data data", "--data stages.toml")),
        ("A table without a column of images", TRAIN.replace("--data data", "--data table.csv")),
        ("Two lists in one folder", TRAIN.replace("--data data", "--data lists")),
        ("Lists in the folders inside", TRAIN.replace("--data data", "--data splits")),
        ("A year that would be read as repeats", TRAIN.replace("--data data", "--data years")),
        ("Shards that are not there", TRAIN.replace("--data data", "--data shards/{00..03}.tar")),
        ("Mirrored crops without crops", f"{TRAIN} --flip"),
        ("A step of buckets where images are squares", f"{TRAIN} --bucket-step 16"),
        ("A step of buckets that the model cannot halve", f"{TRAIN} --buckets --bucket-step 10"),
        ("Sides of buckets that are no pair", f"{TRAIN} --buckets --bucket-sides 32"),
        ("Sides of buckets without the resolution between them", f"{TRAIN} --buckets --bucket-sides 128 256"),
        ("Buckets that the reward cannot judge", f"{TRAIN.replace('--data data', '--data oblong')} --buckets --objective reward --reward scenes"),
        ("One expert alone", f"afa train --experts demo:curves --data data --output out {SMALL}"),
        ("A flag that does not exist", f"{TRAIN} --lerning-rate 0.1"),
        ("A learning rate that is no number", f"{TRAIN} --lr nan"),
        ("A seed below zero", f"{TRAIN} --seed -3"),
        ("A tracker that is not installed", f"{TRAIN} --log-with wandb"),
        ("A recipe that does not exist", "afa train --recipe scene"),
        ("A recipe with a flag that does not exist", "afa train --recipe wrong.toml --data data --output out"),
        ("An objective that does not exist", f"{TRAIN} --objective mse+rewrad"),
        ("A reward without its weights", f"{TRAIN} --objective reward --reward pickscore"),
        ("A reward that cannot be differentiated", f"{TRAIN} --objective reward --reward fid"),
        ("The embedded reward for captions of another world", f"{TRAIN.replace('--data data', '--data foreign')} --objective reward --reward scenes"),
        ("A flow's weighting where nothing flows", f"{TRAIN} --weighting cosmap"),
        ("A metric that watches nothing", f"{TRAIN} --watch clip_t"),
        ("Experts beside a GPU that is not there", f"{TRAIN} --store cpu"),
        ("Experts in parts on all processes, and one process", f"{TRAIN} --store sharded"),
        ("New aggregators for an ensemble that has some", "afa train --start done --hidden 16 --data data --output out"),
        ("A resolution the VAE cannot halve", f"{TRAIN} --resolution 30"),
        ("A placement that does not exist", f"{TRAIN} --placement layer"),
        ("A placement without the last stage", f"{TRAIN} --placement IN00,M00"),
        ("A placement for another family", "afa inspect --config sd15 --placement double"),
        ("Text tokens fused where blocks only read them", f"{TRAIN} --text-stream fused"),
        ("A frame that nobody needs", f"{TRAIN} --frame demo:patterns"),
        ("An output folder with other things in it", TRAIN.replace("--output out", "--output data")),
        ("An output folder that another process writes to", TRAIN.replace("--output out", f"--output {BUSY}")),
        ("A finished ensemble, trained again differently", f"{TRAIN.replace('--output out', '--output done')} --lr 0.5"),
        ("An expert that has changed since the run began", TRAIN.replace("demo:curves", "changed-curves").replace("--output out", "--output begun")),
        ("A LoRA of no rank", "afa finetune demo:curves --data data --output out"),
        ("A LoRA like an ensemble that is none", "afa finetune demo:curves --data data --like data --output out"),
        ("A LoRA's file that is there already", "afa finetune demo:curves --data data --rank 2 --output lora.safetensors"),
    ],
    "One model out": [
        ("A LoRA of rank 0", f"{DISTILL} --student curves --lora 0"),
        ("A student of another world", f"{DISTILL} --student demo:near-round"),
        ("A student that is nowhere", f"{DISTILL} --student nowhere"),
        ("Captions that are none", DISTILL.replace("--data data", "--data none.txt")),
        ("An output inside the ensemble", DISTILL.replace("--output out", "--output done/student")),
        ("A teacher whose expert has changed", DISTILL.replace("distill done", "distill changed")),
        ("An option of training on images", f"{DISTILL} --caption-dropout 0.2"),
        ("Guidance twice", f"{DISTILL} --guidance 3 --guidance-in 3"),
        ("Buckets, of captions alone", f"{DISTILL.replace('--data data', '--data prompts.txt')} --image-share 0 --buckets"),
        ("Images, of captions alone", f"{DISTILL.replace('--data data', '--data none.txt')} --image-share 0.5"),
        ("A share of a batch that is none", f"{DISTILL} --image-share 0.01"),
        ("Half of a sampling", f"{DISTILL} --batch-size 5"),
        ("Text encoders that differ, for a transformer's file", "afa distill flows --data data --output out.safetensors --batch-size 4"),
        ("A method that cannot be learnt", f"{DISTILL} --method superdiff_or"),
        ("A method that needs guidance, without it", f"{DISTILL} --method magicfusion --guidance 1"),
        ("A difference of two equal models", "afa extract demo:curves --base demo:curves --output out"),
        ("A difference of two architectures", "afa extract demo:curves --base demo:near-round --output out"),
    ],
    "A saved ensemble": [
        ("An ensemble whose expert has changed", f"afa generate changed {DRAW}"),
        ("An ensemble whose expert has moved", f"afa generate moved {DRAW}"),
        ("The same, searched in a folder that has no such file", f"afa generate moved {DRAW} --experts data"),
        ("A new place without the expert's name", f"afa generate moved {DRAW} --experts nowhere"),
        ("An ensemble of the hub that is not in the cache, without a network", "afa explain org/ensemble@main --prompt a --output out"),
        ("A push without a network", "afa push done org/ensemble"),
        ("A push to nowhere", "afa push done"),
        ("A push to a branch in the repository's name", "afa push done org/ensemble@main"),
        ("A push into the ensemble itself", "afa push done --output done"),
        ("A push into a folder with other things in it", "afa push done --output data"),
        ("A licence that is none", "afa push done --output out --license my-own!"),
        ("A calibration of an ensemble of the hub", "afa calibrate org/ensemble --prompt a --metric attributes"),
        ("A manifest that is no JSON", f"afa generate mangled {DRAW}"),
        ("A manifest with a value of the wrong type", f"afa generate mistyped {DRAW}"),
        ("A manifest that names an expert by a path", f"afa generate escaping {DRAW}"),
        ("A manifest that names a reward", f"{COMPARE.replace('done', 'rewarded')} --protocol scenes --methods prediction_router"),
    ],
    "Drawing": [
        ("No prompt at all", "afa generate demo:curves --output out"),
        ("An empty file of prompts", "afa generate demo:curves --prompts none.txt --output out"),
        ("Prompts in Latin-1", "afa generate demo:curves --prompts latin1.txt --output out"),
        ("Guidance that is no number", f"afa generate demo:curves {DRAW} --guidance nan"),
        ("A seed below the one that draws a seed", f"afa generate demo:curves {DRAW} --seed -3"),
        ("A seed that is no whole number", f"afa generate demo:curves {DRAW} --seed 1.5"),
        ("More steps than the schedule has", "afa generate demo:curves --prompt a --output out --steps 2000"),
        ("A scheduler that does not exist", f"afa generate demo:curves {DRAW} --scheduler eulr"),
        ("An expert that is not in the ensemble", f"afa generate done {DRAW} --expert curve"),
        ("A strength of nobody", f"afa generate done {DRAW} --strength curvs=0"),
        ("A region that is not one", f"afa generate done {DRAW} --region curves"),
        ("A region of no step", f"afa generate done {DRAW} --region curves=0,start=0.9,end=0.95"),
        ("A region's mask that is not there", f"afa generate done {DRAW} --region curves=0,mask=nowhere.png"),
        ("Every expert off in a region", f"afa generate done {DRAW} --region curves=0 angles=0"),
        ("A strength below zero", f"afa generate done {DRAW} --strength curves=-1"),
        ("A negative prompt that changes nothing", f"afa generate demo:curves {DRAW} --negative-prompt b --guidance 1"),
        ("Guidance beside one that is not built in", f"afa generate demo:curves {DRAW} --true-guidance 2"),
        ("Weights of a single expert", f"afa generate demo:curves {DRAW} --weights"),
        ("An image there already, made otherwise", "afa generate demo:curves --prompt a --output pictures --steps 3"),
        ("A prompt that changes at a step, in A1111's syntax", "afa generate demo:curves --prompt a[b:c:0.5] --prompt-syntax a1111 --output out"),
        ("Two prompts in one, in A1111's syntax", "afa generate demo:curves --prompt a,AND,b --prompt-syntax a1111 --output out"),
        ("A weight of a word that is no number", "afa generate demo:curves --prompt (a:1.2.3) --prompt-syntax a1111 --output out"),
        ("A prompt that names a LoRA, without a folder", "afa generate demo:curves --prompt <lora:style:1> --prompt-syntax a1111 --output out"),
        (
            "A prompt that names a LoRA outside its folder",
            "afa generate demo:curves --prompt <lora:../lora:1> --output out --lora-dir data --prompt-syntax a1111",
        ),
        ("A folder of LoRAs for prompts that are read as they are", f"afa generate demo:curves {DRAW} --lora-dir data"),
        ("A grid with one axis", f"afa generate demo:curves {DRAW} --grid prompt"),
        ("A grid with an axis that is none", f"afa generate demo:curves {DRAW} --grid prompt sed"),
        ("A grid of steps, beside steps", f"afa generate demo:curves {DRAW} --grid prompt steps=2,4"),
        ("An interval of guidance that is none", f"afa generate demo:curves {DRAW} --guidance-interval half"),
        ("An interval of guidance without a step", f"afa generate demo:curves {DRAW} --guidance-interval 0.6,0.2"),
        ("Guidance left out where there is none", f"afa generate demo:curves {DRAW} --guidance 1 --guidance-interval 0,0.6"),
        ("A leading expert that is not in the ensemble", f"afa generate done {DRAW} --reuse 2 --lead curve"),
        ("A level of speed before a calibration", "afa generate done --prompt a --output out --speed balanced"),
        ("A level of speed and the steps that it decides", f"afa generate done {DRAW} --speed balanced"),
        ("A calibration of an embedded ensemble", "afa calibrate demo:ensemble --prompt a b c d e f g --metric attributes"),
        ("A calibration by two prompts", "afa calibrate done --prompt a b --metric attributes"),
        ("A calibration by a metric of a set of images", "afa calibrate done --prompt a b c d e f g --metric frechet"),
        ("Differences between experts where there is one", f"afa generate demo:curves {DRAW} --store delta1"),
        ("A size of shards without shards", f"afa generate demo:curves {DRAW} --pack-size 10"),
        ("Weight maps in shards", f"afa generate done {DRAW} --weights --pack tar"),
        ("A method that does not exist", f"afa generate done --method noise_avrage {DRAW}"),
        ("An option of another method", f"afa generate done --method magicfusion --method-option temperature=1 {DRAW}"),
        ("MagicFusion without guidance", f"afa generate done --method magicfusion --guidance 1 {DRAW}"),
        ("A demonstration begun otherwise", "afa demo --output demonstrated --seed 1"),
    ],
    "Merging and searching": [
        ("A merge that does not exist", "afa merge --method wieghted --experts demo:curves demo:angles --output out"),
        ("A merge without the base it needs", "afa merge --method ties --experts demo:curves demo:angles --output out"),
        ("Weights for two of three experts", "afa merge --method weighted --experts demo:curves demo:angles demo:patterns --weights 1 2 --output out"),
        ("An option of another merge", "afa merge --method weighted --experts demo:curves demo:angles --density 0.2 --output out"),
        ("Merging two architectures", "afa merge --method weighted --experts demo:curves wide --output out"),
        ("Text encoders that differ, for a transformer's file", "afa merge --experts flow flow-other --output out.safetensors"),
        ("A merge over one of its own experts", "afa merge --method weighted --experts mine demo:angles --output mine"),
        ("Block weights of a stage that does not exist", "afa merge --method mbw --experts demo:curves demo:angles --weights stages.toml --output out"),
        ("A density of nothing", "afa merge --method ties --experts demo:curves demo:angles --base demo:base --density 0 --output out"),
        ("A search whose metric lacks its weights", "afa search --experts demo:curves demo:angles --prompt a --output out"),
        ("A search for a metric of whole sets", "afa search --experts demo:curves demo:angles --prompt a --metric frechet --output out"),
        ("A search by a scorer that fails", "afa search --experts demo:curves demo:angles --prompt a --scorer raises.py --output out"),
    ],
    "Comparing": [
        ("A comparison by a method that does not exist", f"{COMPARE} --protocol scenes --methods magicfussion"),
        ("A study that is another flag now", f"{COMPARE} --protocol scenes --study steps"),
        ("Curves over a single value", f"{COMPARE} --protocol scenes --curves afa"),
        ("A protocol that does not exist", f"{COMPARE} --protocol scenez"),
        ("COCO without its files", f"{COMPARE} --protocol coco2017"),
        ("COCO from a folder of something else", f"{COMPARE} --protocol coco2017 --protocol-data data"),
        ("DrawBench from another table", f"{COMPARE} --protocol drawbench --protocol-data table.csv"),
        ("Pictures to compare with that are broken", f"{COMPARE} --protocol broken --metrics frechet"),
        ("A metric without its weights", f"{COMPARE} --protocol scenes --metrics fid"),
        ("Weights for a metric that is not used", f"{COMPARE} --protocol scenes --metric-weights fid=weights.pth"),
        ("A metric that needs real images, without any", f"{COMPARE} --protocol prompts.txt --metrics frechet"),
        ("A scorer that cannot be run", f"{COMPARE} --protocol prompts.txt --scorer broken.py"),
        ("A scorer without score()", f"{COMPARE} --protocol prompts.txt --scorer silent.py"),
        ("A scorer that fails", f"{COMPARE} --protocol prompts.txt --scorer raises.py"),
        ("A rival that needs a base, asked for by name", f"{COMPARE} --protocol scenes --methods ties"),
        ("A comparison into a folder of something else", f"{COMPARE.replace('--output out', '--output data')} --protocol scenes"),
        ("A report of a folder without results", "afa report data --output report.html"),
        ("A report that is no page", "afa report data --output data"),
    ],
    "Screening, explaining, the page": [
        ("One expert to screen", "afa screen demo:curves --data data"),
        ("A screening without data", "afa screen demo:curves demo:angles"),
        ("A screening of two architectures", "afa screen demo:curves wide --data data"),
        ("A single noise, from which nothing can be learnt", "afa screen demo:curves demo:angles --data data --draws 1"),
        ("Guidance where nothing is drawn", "afa screen demo:curves demo:angles --data data --guidance 3"),
        ("A screening's folder of something else", "afa screen demo:curves demo:angles --data data --output data"),
        ("A single expert to explain", "afa explain demo:curves --prompt a --output out"),
        ("A counterfactual that does not exist", "afa explain done --prompt a --output out --counterfactuals of"),
        ("An explanation into a folder of something else", "afa explain done --prompt a --output data"),
        ("A port that is none", "afa ui --port 70000"),
        ("A page of a report that is not there", "afa ui --reports nowhere"),
        ("Nodes for a folder that is not ComfyUI's", "afa comfyui --install data"),
        ("Nodes over a file that somebody has changed", "afa comfyui --install comfyui"),
        ("A command that does not exist", "afa generat"),
    ],
}  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--small", type=Path, help="an empty file system of about 1 MB")
    flags.add_argument("--only", default="", help="run only cases in whose title these words stand")
    given = flags.parse_args()
    small = given.small
    print("# Bad input, tried\n\nWritten by `python docs/try_errors.py`: what each command printed last. Nothing is left behind where nothing is said of it.")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        prepare(folder)
        for group, cases in CASES.items():
            print(f"\n## {group}")
            for what, command in [case for case in cases if given.only in case[0]]:
                with locked(folder / BUSY) if BUSY in command.split() else contextlib.nullcontext():
                    report(what, command, folder)
        if small is not None:
            (folder / "small").symlink_to(small)
            command = TRAIN.replace("--output out", "--output small/out").replace("--hidden 8", "--hidden 32")
            report("A disk that is full when the training state is saved", command, folder)
            print(f"\nLeft on the full disk: {[path.name for path in small.rglob('*') if path.is_file()] or 'no file'}.")


def report(what: str, command: str, folder: Path) -> None:
    """Run one command; print its last words and its exit code. Raises ValueError if they name a place of this machine."""
    before = inventory(folder)
    code, said = run(command, folder)
    left = sorted(inventory(folder) - before)
    words = re.sub(r"pid \d+", "pid …", (said.strip().splitlines() or ["(nothing)"])[-1])
    if any(str(place) in words for place in (folder, ASSETS, Path.home())):
        raise ValueError(f"{command} names a place of this machine: {words}")
    print(f"\n### {what}\n\n    $ {command}\n    {words}\n\nExit code {code}.{f' Left behind: {left}.' if left else ''}", flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)


def run(command: str, folder: Path) -> tuple[int | None, str]:
    """One command in a process of its own. -> its exit code, and what it wrote to stderr."""
    ours, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=_run, args=(command.split()[1:], folder, theirs))
    process.start()
    theirs.close()
    try:
        said = ours.recv()
    except EOFError:
        said = ""
    process.join()
    return process.exitcode, said


def _run(arguments: list[str], folder: Path, answers: Connection) -> None:
    os.chdir(folder)
    errors, code = io.StringIO(), 1
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = afa(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception:
            traceback.print_exc()
    answers.send(errors.getvalue())
    answers.close()
    os._exit(code)


def inventory(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def prepare(folder: Path) -> None:
    """Good things and broken ones."""
    shutil.copytree(ASSETS / "curves", folder / "mine")
    shutil.copytree(ASSETS / "curves", folder / "changed-curves")
    draw(folder / "data", "mixed", 12, 0)
    (folder / "comfyui" / "custom_nodes" / "comfyui-afa").mkdir(parents=True)
    (folder / "comfyui" / "comfy").mkdir()
    for name in ("main.py", "custom_nodes/comfyui-afa/__init__.py"):
        (folder / "comfyui" / name).write_text("# theirs\n")
    _broken_models(folder)
    _broken_data(folder)
    begun = TRAIN.replace("demo:curves", "changed-curves").replace("--output out", "--output begun")
    for command in (TRAIN.replace("--output out", "--output done"), "afa generate demo:curves --prompt a --output pictures --steps 2", begun):
        code, said = run(command, folder)
        if code != 0:
            raise ValueError(f"{command}: {said}")
    for name in ("mangled", "mistyped", "escaping", "rewarded", "moved"):
        shutil.copytree(folder / "done", folder / name)
    shutil.copytree(folder / "begun", folder / "changed")
    (folder / "mangled" / "afa.json").write_text("{")
    manifest = json.loads((folder / "done" / "afa.json").read_text())
    (folder / "mistyped" / "afa.json").write_text(json.dumps(manifest | {"placement": 3}))
    first = {**manifest["experts"][0], "name": "../x"}
    (folder / "escaping" / "afa.json").write_text(json.dumps(manifest | {"experts": [first, *manifest["experts"][1:]]}))
    manifest["training"]["settings"] |= {"objective": "reward", "reward": "reward.py"}
    (folder / "rewarded" / "afa.json").write_text(json.dumps(manifest))
    (folder / "rewarded" / "reward.py").write_text("raise SystemExit('this must not run')\n")
    manifest["experts"][0]["source"] = "../gone/moved-curves"
    (folder / "moved" / "afa.json").write_text(json.dumps(manifest))
    _change(folder / "changed-curves" / WEIGHTS, 1.0)


def _broken_models(folder: Path) -> None:
    whole = (folder / "mine" / WEIGHTS).read_bytes()
    tensors = load_file(folder / "mine" / WEIGHTS)
    for name in ("cut", "hole", "mute", "nan", "wide", "epsilon", "rescaled", "tabled", "pickled", "function"):
        shutil.copytree(folder / "mine", folder / name)
    shutil.copytree(folder / "mine" / "unet", folder / "alone")
    (folder / "old.ckpt").write_bytes(b"\x80\x02")
    (folder / "cut" / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    save_file({name: tensors[name] for name in list(tensors)[1:]}, folder / "hole" / WEIGHTS)
    text = folder / "mute" / "text_encoder" / "model.safetensors"
    words = load_file(text)
    save_file({name: words[name] for name in list(words)[1:]}, text)
    _change(folder / "nan" / WEIGHTS, float("nan"))
    config = json.loads((folder / "mine" / "unet" / "config.json").read_text()) | {"block_out_channels": [48, 112]}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(folder / "wide" / "unet")
    _edit(folder / "epsilon" / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    _edit(folder / "rescaled" / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    _edit(folder / "tabled" / "scheduler" / "scheduler_config.json", trained_betas=[1e-3 + 1e-5 * index for index in range(1000)])
    _edit(folder / "function" / "model_index.json", unet=["diffusers.utils", "load_image"])
    (folder / "pickled" / WEIGHTS).unlink()
    torch.save({}, (folder / "pickled" / WEIGHTS).with_suffix(".bin"))
    _broken_files(folder, whole, tensors)
    _transformers(folder)


def _transformers(folder: Path) -> None:
    """Files of real sizes without content, broken ones, and small pipelines, as the tests make them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny_flux2 import klein_pipeline
    from tiny_transformers import flux_pipeline

    for name, pipeline in {"flow": flux_pipeline(0, 0), "flow-other": flux_pipeline(1, 1), "klein-base": klein_pipeline()}.items():
        pipeline.save_pretrained(folder / name)
    Ensemble.from_experts([str(folder / "flow"), str(folder / "flow-other")], aggregator="mean").save(folder / "flows")
    shutil.copytree(folder / "klein-base", folder / "klein-turbo")
    _edit(folder / "klein-turbo" / "model_index.json", is_distilled=True)
    shutil.copy(folder / "klein-base" / "transformer" / "diffusion_pytorch_model.safetensors", folder / "turbo.safetensors")
    for name, config in {"flux2": "flux2", "klein": "flux2-klein", "z-image": "z-image", "lumina2": "lumina2"}.items():
        tensors = describe_config(name, config).expert.model.state_dict()
        empty_file({key: tuple(tensor.shape) for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    whole = (folder / "klein.safetensors").open("rb").read(4_000_000)
    (folder / "cut-transformer.safetensors").write_bytes(whole)
    layer = "transformer_blocks.0.attn.to_q"
    packed = {f"{layer}.weight_scale_2": torch.ones(()), f"{layer}.weight": torch.zeros(3072, 1536, dtype=torch.uint8)}
    marks = {mark: torch.zeros(3072, 128) for mark in next(entry for entry in TRANSFORMERS if entry.family == "FLUX.2" and entry.diffusers).marks}
    save_file(packed | marks, folder / "nvfp4-transformer.safetensors")
    (folder / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 300, 20))
    down, up = torch.zeros(4, 3072), torch.zeros(3072, 4)
    pairs = {f"lora_unet_double_blocks_0_img_attn_proj.lora_{end}.weight": tensor for end, tensor in (("down", down), ("up", up))}
    save_file(pairs, folder / "flux-lora.safetensors")


def empty_file(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """A file of tensors in bfloat16 of which nothing stands on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def _broken_files(folder: Path, whole: bytes, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, header in {"null": "null", "offsets": '{"conv_in.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}'}.items():
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(4, 4, 3, 3)}, folder / "lora.safetensors")
    save_file({"lora_unet_conv_in.oft_blocks": torch.zeros(4, 4)}, folder / "oft.safetensors")
    save_file({}, folder / "empty.safetensors")
    run("afa merge --experts mine mine2=mine --output merged.safetensors", folder)
    original = {name: tensor for name, tensor in load_file(folder / "merged.safetensors").items() if name not in ("v_pred", "ztsnr")}
    save_file(original, folder / "noise.safetensors")
    save_file(original | {"v_pred": torch.empty(0)}, folder / "velocity.safetensors")
    matrix = next(name for name, tensor in original.items() if name.endswith(".weight") and tensor.ndim == 2 and "diffusion_model" in name)
    for name, kind, key in (("nvfp4", torch.uint8, "weight_scale_2"), ("int8", torch.int8, "weight_scale")):
        packed = {matrix: original[matrix].to(kind), f"{matrix.removesuffix('.weight')}.{key}": torch.ones(())}
        save_file(original | packed, folder / f"{name}.safetensors")


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _change(file: Path, value: float) -> None:
    tensors = load_file(file)
    tensors["conv_in.bias"] += value
    save_file(tensors, file)


def _broken_data(folder: Path) -> None:
    entries = {"silent": [{"file_name": "a.png", "text": ""}], "broken": [{"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "x"}]}
    entries["few"] = [{"file_name": "a.png", "text": "x"}] * 3
    entries["foreign"] = [{"file_name": "a.png", "text": "a cat"}] * 12
    entries["outside"] = [{"file_name": "../few/a.png", "text": "a cat"}] * 12
    entries["bombs"] = [{"file_name": "a.png", "text": "a cat"}] * 12
    for name in ("empty", *entries):
        (folder / name).mkdir()
    for name, lines in entries.items():
        Image.new("RGB", (8, 8)).save(folder / name / "a.png")
        (folder / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "broken" / "a.png").write_bytes(b"no image")
    shutil.copytree(folder / "data", folder / "oblong")
    for path in (folder / "oblong").rglob("*.png"):
        Image.new("RGB", (60, 30)).save(path)
    shutil.copytree(folder / "few", folder / "lists")
    (folder / "lists" / "metadata.csv").write_text("file_name,text\na.png,x\n")
    shutil.copytree(folder / "few", folder / "splits" / "train")
    (folder / "years" / "2023_holidays").mkdir(parents=True)
    shutil.copy(folder / "few" / "a.png", folder / "years" / "2023_holidays")
    Image.new("1", (30_000, 30_000)).save(folder / "bombs" / "a.png")
    (folder / "wrong.toml").write_text("learning-rate = 0.1\n")
    (folder / "none.txt").write_text("\n\n")
    (folder / "latin1.txt").write_bytes("a café\n".encode("latin-1"))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "stages.toml").write_text("IN99 = 0.5\n")
    (folder / "table.csv").write_text("Prompts,Category\na cat,Animals\n")
    (folder / "broken.py").write_text("import no_such_module\n")
    (folder / "silent.py").write_text("def judge(images, captions):\n    return {}\n")
    (folder / "raises.py").write_text("def score(images, captions):\n    return {'sharp': images.mean(1)[caption]}\n")
    (folder / "demonstrated").mkdir()
    begun = {"prompts": 80, "train_images": 512, "train_steps": 250, "steps": 20, "guidance": 3.0, "seed": 0}
    (folder / "demonstrated" / "settings.json").write_text(json.dumps(begun))
    (folder / "demonstrated" / "data").mkdir()  # something was made: an empty beginning binds nobody


if __name__ == "__main__":
    main()
