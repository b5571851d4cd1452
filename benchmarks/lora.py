"""What N LoRAs of one base cost as experts: memory and time, sharing the base's weights against N fused copies.

    python benchmarks/lora.py
    python benchmarks/lora.py --width 320 --experts 1 2 --repeats 3

A base of SD 1.5's architecture, narrower by default, with random weights in float32, and a LoRA of rank 16 for each expert,
on the projections of attention. Every measurement is a process of its own: it loads the experts, then runs the denoiser.
Weights: bytes of all experts' tensors, what several share counted once. Peak: resident memory of the process at its highest,
less what it held before the first file was read. Difference: the largest between the predictions of the two, over the
largest of the predictions. Time: forward passes of one latent in turn, both in one process, after one round that is not
counted. One expert alone on its base has its LoRA in its weights either way.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from merge import resident
from timing import Spread, peak_memory

from afa.cli.flags import add_flags, read_flags
from afa.cli.main import hush
from afa.settings import option

WAYS = ("shared", "fused")
RANK = 16
PARTS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Options:
    """One measurement, field by field a flag."""

    width: int = option(96, help="channels of the U-Net at its finest level; SD 1.5 has 320")
    experts: list[int] = option([1, 2, 4, 8], help="how many experts, two processes each")
    size: int = option(128, help="side of the image in pixels")
    repeats: int = option(5, help="forward passes that are timed")
    threads: int = option(2, help="threads of torch")
    folder: str | None = option(
        None, help="where the files are written for the time being (default: the system's)"
    )
    json: bool = option(False, help="print JSON")


def write_base(folder: Path, width: int) -> None:
    """A pipeline's folder: SD 1.5's U-Net at another width, and small parts around it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from afa.experts.single_file import CONFIGS, clip_tokenizer

    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(CONFIGS / "sd15" / "unet")
    text = CLIPTextConfig(hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12)
    unet = UNet2DConditionModel.from_config(
        {**config, "block_out_channels": [width, 2 * width, 4 * width, 4 * width]}
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {
        "unet": unet,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": clip_tokenizer(),
        "scheduler": scheduler,
        "vae": AutoencoderKL(),
    }
    empty = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **empty).save_pretrained(folder)


def write_lora(base: Path, file: Path, seed: int) -> None:
    """A LoRA of the base's U-Net that changes what it predicts."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PARTS))
    layers = {
        name: 0.05 * torch.randn(tensor.shape) for name, tensor in get_peft_model_state_dict(unet).items()
    }
    StableDiffusionPipeline.save_lora_weights(file.parent, unet_lora_layers=layers, weight_name=file.name)


def load(how: str, count: int, folder: Path) -> Any:
    """The denoiser of `count` experts. One by one they do not know of each other, and each has the whole base with its LoRA in it."""
    from afa.ensemble import Ensemble
    from afa.experts.load import load_expert

    specs = [f"e{index}={folder / 'base'}+{folder / f'lora{index}.safetensors'}" for index in range(count)]
    sources = [load_expert(spec) for spec in specs] if how == "fused" else specs
    return Ensemble.from_experts(sources, aggregator="mean", placement="out").denoiser


def call_at(size: int) -> dict[str, Any]:
    """What a pipeline hands over at one step."""
    draw = torch.Generator().manual_seed(0)
    text, sample = (
        torch.randn(1, 77, 768, generator=draw),
        torch.randn(1, 4, size // 8, size // 8, generator=draw),
    )
    return {"sample": sample, "timestep": torch.tensor(500), "encoder_hidden_states": text}


@torch.no_grad()
def memory(how: str, count: int, folder: Path, size: int) -> dict[str, float]:
    """In this process: load experts and run them once."""
    from afa.denoiser.lora import unique_bytes
    from afa.ensemble import Ensemble  # noqa: F401 (counts as the program's own)

    held = resident()
    denoiser = load(how, count, folder)
    tensors = [tensor for expert in denoiser.experts for tensor in (*expert.parameters(), *expert.buffers())]
    denoiser(**call_at(size))
    return {"weights": unique_bytes(tensors), "peak": peak_memory("cpu") * 1e9 - held}


@torch.no_grad()
def seconds(count: int, folder: Path, size: int, repeats: int) -> dict[str, Any]:
    """In this process: both, run in turn."""
    both = {how: load(how, count, folder) for how in WAYS}
    times: dict[str, list[float]] = {how: [] for how in WAYS}
    predictions, call = {}, call_at(size)
    for _ in range(repeats + 1):
        for how, denoiser in both.items():
            began = time.perf_counter()
            predictions[how] = denoiser(**call).sample
            times[how].append(time.perf_counter() - began)
    shared, fused = (predictions[how] for how in WAYS)
    difference = float((shared - fused).abs().max() / fused.abs().max())
    return {"difference": difference, "seconds": {how: taken[1:] for how, taken in times.items()}}


def compare(count: int, folder: Path, options: Options) -> dict[str, Any]:
    """Memory of both ways, each in a process of its own, and their time in another."""
    found: dict[str, Any] = {"experts": count}
    for what in (*WAYS, "time"):
        print(f"{count} experts, {what}", file=sys.stderr, flush=True)
        numbers = [str(number) for number in (count, options.size, options.repeats, options.threads)]
        done = subprocess.run(
            [sys.executable, __file__, "--measure", what, str(folder), *numbers],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        found[what] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines(found: dict[str, Any]) -> str:
    """One comparison, for people."""
    shared, fused, taken = found["shared"], found["fused"], found["time"]["seconds"]
    text = [f"{found['experts']} experts: largest difference {found['time']['difference']:.1e}"]
    for name in ("weights", "peak"):
        text.append(
            f"  {name:7}  shared {shared[name] / 1e9:6.2f} GB   fused {fused[name] / 1e9:6.2f} GB   ratio {shared[name] / fused[name]:.2f}"
        )
    text += [f"  {how:17} {Spread.of(taken[how])} s" for how in WAYS]
    ratios = [mine / theirs for mine, theirs in zip(taken["shared"], taken["fused"], strict=True)]
    text.append(f"  shared over fused {Spread.of(ratios)}")
    return "\n".join(text)


def in_this_process(
    what: str, folder: Path, count: int, size: int, repeats: int, threads: int
) -> dict[str, Any]:
    """What a process of its own measures."""
    torch.set_num_threads(threads)
    return seconds(count, folder, size, repeats) if what == "time" else memory(what, count, folder, size)


def main() -> None:
    """Write the files, measure in processes of their own, print."""
    if len(sys.argv) > 1 and sys.argv[1] == "--measure":
        what, folder_name, *numbers = sys.argv[2:]
        print(json.dumps(in_this_process(what, Path(folder_name), *map(int, numbers))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Options)
    options: Options = read_flags(Options, parser.parse_args())
    hush()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        write_base(folder / "base", options.width)
        for index in range(max(options.experts)):
            write_lora(folder / "base", folder / f"lora{index}.safetensors", seed=index + 1)
        results = []
        for count in options.experts:
            results.append(compare(count, folder, options))
            if not options.json:
                print(lines(results[-1]), flush=True)
    if options.json:
        print(json.dumps({"options": asdict(options), "results": results}, indent=2))


if __name__ == "__main__":
    main()
