"""`python docs/try_errors.py > docs/errors.md`: make every mistake on purpose and write down what was said.

The full-disk case needs a small file system: give its mount point with --small (on Linux, as root:
mount -t tmpfs -o size=1m tmpfs DIR); without it that case is left out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

from afa.demo.draw import draw
from afa.demo.world import EXPERTS

SMALL = "--hidden 8 --heads 2 --batch-size 2 --steps 2 --device cpu"
TRAIN = f"afa train --experts curves angles --data data --output out {SMALL}"

COMPARE = "afa evaluate --ensemble done --output out"

# (what is wrong, command); everything is relative to a folder with curves, angles, patterns, data and the broken things
CASES = [
    ("A path that is not there", "afa inspect curves curvs"),
    ("A hub id that is not in the cache, without a network", "afa inspect org/model@main"),
    ("A pickle instead of safetensors", "afa inspect old.ckpt"),
    ("A folder that is no model", "afa inspect data"),
    ("A file cut short", "afa inspect cut.safetensors"),
    ("A LoRA given as an expert", "afa inspect lora.safetensors"),
    ("Weights cut short in a folder", "afa inspect cut"),
    ("Weights with a missing tensor in a folder", "afa generate hole --prompt a --output out"),
    ("A text encoder with a missing tensor", "afa generate mute --prompt a --output out"),
    ("Experts of two architectures", "afa inspect curves wide"),
    ("The same, on the way to training", f"afa train --experts curves wide --data data --output out {SMALL}"),
    ("Experts that predict different things", "afa inspect curves epsilon"),
    ("Two experts of one name", f"afa train --experts curves curves --data data --output out {SMALL}"),
    ("No data folder", TRAIN.replace("--data data", "--data nowhere")),
    ("No metadata.jsonl", TRAIN.replace("--data data", "--data empty")),
    ("Captions missing everywhere", TRAIN.replace("--data data", "--data silent")),
    ("Images missing or broken everywhere", TRAIN.replace("--data data", "--data broken")),
    ("Too few images", TRAIN.replace("--data data", "--data few")),
    ("Data of no known form", TRAIN.replace("--data data", "--data table.csv")),
    ("Shards that are not there", TRAIN.replace("--data data", "--data shards/{00..03}.tar")),
    ("Mirrored crops without crops", f"{TRAIN} --flip"),
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
    ("New aggregators for an ensemble that has some", "afa train --start done --hidden 16 --data data --output out"),
    ("A resolution the VAE cannot halve", f"{TRAIN} --resolution 30"),
    ("A placement that does not exist", f"{TRAIN} --placement layer"),
    ("A placement without the last stage", f"{TRAIN} --placement IN00,M00"),
    ("A placement for another family", "afa inspect --config sd15 --placement double"),
    ("Text tokens fused where blocks only read them", f"{TRAIN} --text-stream fused"),
    ("A denoiser alone, and nobody to lend it the rest", "afa generate curves/unet --prompt a --output out"),
    ("A frame that is no pipeline", "afa generate curves/unet --frame data --prompt a --output out"),
    ("A frame that nobody needs", f"{TRAIN} --frame patterns"),
    ("An output folder with other things in it", TRAIN.replace("--output out", "--output curves")),
    ("A finished ensemble, trained again differently", f"{TRAIN.replace('--output out', '--output done')} --lr 0.5"),
    ("An ensemble whose expert has changed", "afa generate changed --prompt a --output out"),
    ("An ensemble whose expert has moved", "afa generate moved --prompt a --output out"),
    ("A manifest that is no JSON", "afa generate mangled --prompt a --output out"),
    ("No prompt at all", "afa generate curves --output out"),
    ("An empty file of prompts", "afa generate curves --prompts none.txt --output out"),
    ("A scheduler that does not exist", "afa generate curves --prompt a --output out --scheduler eulr"),
    ("An expert that is not in the ensemble", "afa generate done --prompt a --output out --expert curve"),
    ("A negative prompt that changes nothing", "afa generate curves --prompt a --negative-prompt b --guidance 1 --output out"),
    ("Guidance beside one that is not built in", "afa generate curves --prompt a --true-guidance 2 --output out"),
    ("Weights of a single expert", "afa generate curves --prompt a --output out --weights"),
    ("An image there already, made otherwise", "afa generate curves --prompt a --output pictures --steps 3"),
    ("A demonstration begun otherwise", "afa demo --output begun --seed 1"),
    ("A merge that does not exist", "afa merge --method wieghted --experts curves angles --output out"),
    ("A merge without the base it needs", "afa merge --method ties --experts curves angles --output out"),
    ("Weights for two of three experts", "afa merge --method weighted --experts curves angles patterns --weights 1 2 --output out"),
    ("An option of another merge", "afa merge --method weighted --experts curves angles --density 0.2 --output out"),
    ("Merging two architectures", "afa merge --method weighted --experts curves wide --output out"),
    ("A merge over one of its own experts", "afa merge --method weighted --experts curves angles --output curves"),
    ("Block weights of a stage that does not exist", "afa merge --method mbw --experts curves angles --weights stages.toml --output out"),
    ("A search whose metric lacks its weights", "afa search --experts curves angles --prompt a --output out"),
    ("A search for a metric of whole sets", "afa search --experts curves angles --prompt a --metric frechet --output out"),
    ("A LoRA of no rank", "afa finetune curves --data data --output out"),
    ("A LoRA like an ensemble that is none", "afa finetune curves --data data --like data --output out"),
    ("A method that does not exist", "afa generate done --method noise_avrage --prompt a --output out"),
    ("An option of another method", "afa generate done --method magicfusion --method-option temperature=1 --prompt a --output out"),
    ("MagicFusion without guidance", "afa generate done --method magicfusion --guidance 1 --prompt a --output out"),
    ("A comparison by a method that does not exist", f"{COMPARE} --protocol scenes --methods magicfussion"),
    ("A protocol that does not exist", f"{COMPARE} --protocol scenez"),
    ("COCO without its files", f"{COMPARE} --protocol coco2017"),
    ("One expert to screen", "afa screen curves --data data"),
    ("A screening without data", "afa screen curves angles"),
    ("A screening of two architectures", "afa screen curves wide --data data"),
    ("A single noise, from which nothing can be learnt", "afa screen curves angles --data data --draws 1"),
    ("Guidance where nothing is drawn", "afa screen curves angles --data data --guidance 3"),
    ("A screening's folder of something else", "afa screen curves angles --data data --output data"),
    ("A strength of nobody", "afa generate done --prompt a --output out --strength curvs=0"),
    ("A single expert to explain", "afa explain curves --prompt a --output out"),
    ("A counterfactual that does not exist", "afa explain done --prompt a --output out --counterfactuals of"),
    ("An explanation into a folder of something else", "afa explain done --prompt a --output data"),
    ("A port that is none", "afa ui --port 70000"),
    ("A page of a report that is not there", "afa ui --reports nowhere"),
    ("COCO from a folder of something else", f"{COMPARE} --protocol coco2017 --protocol-data data"),
    ("DrawBench from another table", f"{COMPARE} --protocol drawbench --protocol-data table.csv"),
    ("A metric without its weights", f"{COMPARE} --protocol scenes --metrics fid"),
    ("Weights for a metric that is not used", f"{COMPARE} --protocol scenes --metric-weights fid=weights.pth"),
    ("A metric that needs real images, without any", f"{COMPARE} --protocol prompts.txt --metrics frechet"),
    ("A scorer that cannot be run", f"{COMPARE} --protocol prompts.txt --scorer broken.py"),
    ("A scorer without score()", f"{COMPARE} --protocol prompts.txt --scorer silent.py"),
    ("A rival that needs a base, asked for by name", f"{COMPARE} --protocol scenes --prompts 2 --steps 1 --tuning 0 --methods ties"),
    ("A comparison into a folder of something else", f"{COMPARE.replace('--output out', '--output data')} --protocol scenes"),
    ("A report of a folder without results", "afa report data --output report.html"),
    ("A report that is no page", "afa report data --output data"),
]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--small", type=Path, help="an empty file system of about 1 MB")
    small = flags.parse_args().small
    print("# Bad input, tried\n\nWritten by `python docs/try_errors.py`; every line below is what the command printed. Nothing is left behind by any of them.")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for what, command in CASES:
            report(what, command, Path(folder))
        if small is not None:
            (Path(folder) / "small").symlink_to(small)
            command = TRAIN.replace("--output out", "--output small/out").replace("--hidden 8", "--hidden 32")
            report("A disk that is full when the training state is saved", command, Path(folder))
            print(f"\nLeft on the full disk: {[path.name for path in small.rglob('*') if path.is_file()] or 'no file'}.")


def report(what: str, command: str, folder: Path) -> None:
    """Run one command; print its last words and its exit code."""
    before = inventory(folder)
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    said = done.stderr.strip().splitlines() or ["(nothing)"]
    left = sorted(inventory(folder) - before)
    words = said[-1].replace(str(folder.resolve()), "/…")
    print(f"\n## {what}\n\n    $ {command}\n    {words}\n\nExit code {done.returncode}.{f' Left behind: {left}.' if left else ''}", flush=True)


def inventory(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def prepare(folder: Path) -> None:
    """Good things and broken ones."""
    for name, source in EXPERTS.items():
        shutil.copytree(source, folder / name)
    draw(folder / "data", "mixed", 12, 0)
    _broken_models(folder)
    _broken_data(folder)
    for command in (TRAIN.replace("--output out", "--output done"), "afa generate curves --prompt a --output pictures --steps 2"):
        subprocess.run([sys.executable, "-m", *command.split()], cwd=folder, check=True, capture_output=True)
    shutil.copytree(folder / "done", folder / "mangled")
    (folder / "mangled" / "afa.json").write_text("{")
    for name in ("changed", "moved"):
        shutil.copytree(folder / "done", folder / name)
        shutil.copytree(folder / "curves", folder / f"{name}-curves")
        manifest = (folder / name / "afa.json").read_text().replace('"../curves"', f'"../{name}-curves"')
        (folder / name / "afa.json").write_text(manifest)
    shutil.rmtree(folder / "moved-curves")
    _change(folder / "changed-curves" / "unet")


def _broken_models(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    whole = (folder / "curves" / weights).read_bytes()
    (folder / "old.ckpt").write_bytes(b"\x80\x02")
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("cut", "hole", "mute", "wide", "epsilon"):
        shutil.copytree(folder / "curves", folder / name)
    (folder / "cut" / weights).write_bytes(whole[: len(whole) // 2])
    tensors = load_file(folder / "hole" / weights)
    save_file({name: tensors[name] for name in list(tensors)[1:]}, folder / "hole" / weights)
    text = folder / "mute" / "text_encoder" / "model.safetensors"
    words = load_file(text)
    save_file({name: words[name] for name in list(words)[1:]}, text)
    save_file({"lora_unet_down_blocks_0.lora_down.weight": tensors["conv_in.weight"]}, folder / "lora.safetensors")
    config = json.loads((folder / "curves" / "unet" / "config.json").read_text()) | {"block_out_channels": [48, 112]}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "wide" / "unet")
    scheduler = folder / "epsilon" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))


def _change(unet: Path) -> None:
    file = unet / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    save_file(tensors, file)


def _broken_data(folder: Path) -> None:
    entries = {"silent": [{"file_name": "a.png", "text": ""}], "broken": [{"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "x"}]}
    entries["few"] = [{"file_name": "a.png", "text": "x"}] * 3
    entries["foreign"] = [{"file_name": "a.png", "text": "a cat"}] * 12
    for name in ("empty", *entries):
        (folder / name).mkdir()
    for name, lines in entries.items():
        Image.new("RGB", (8, 8)).save(folder / name / "a.png")
        (folder / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "broken" / "a.png").write_bytes(b"no image")
    (folder / "wrong.toml").write_text("learning-rate = 0.1\n")
    (folder / "none.txt").write_text("\n\n")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "stages.toml").write_text("IN99 = 0.5\n")
    (folder / "table.csv").write_text("Prompts,Category\na cat,Animals\n")
    (folder / "broken.py").write_text("import no_such_module\n")
    (folder / "silent.py").write_text("def judge(images, captions):\n    return {}\n")
    (folder / "begun").mkdir()
    begun = {"prompts": 80, "train_images": 512, "train_steps": 250, "steps": 20, "guidance": 3.0, "seed": 0}
    (folder / "begun" / "settings.json").write_text(json.dumps(begun))
    (folder / "begun" / "data").mkdir()  # something was made: an empty beginning binds nobody


if __name__ == "__main__":
    main()
