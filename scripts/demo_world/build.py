"""`python -m scripts.demo_world.build`: make the embedded world from nothing.

It takes about an hour and a half on two cores. It may be interrupted: the same command continues.
"""

import argparse
import copy
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from scripts.demo_world import denoisers, parts
from scripts.demo_world.fit import Schedule

BASE = Schedule(900, 1e-3, batch=64, average=0.999, warm_up=200)
EXPERT = Schedule(1200, 7e-4, batch=64, average=0.999)  # equal effort for each
OWN_TEXT_ENCODER = "patterns"  # the expert that fine-tunes its text encoder too


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m scripts.demo_world.build", description=__doc__)
    flags.add_argument(
        "--output", type=Path, default=Path("demo-world"), help="where the world goes (default: demo-world)"
    )
    flags.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="training states (default: build/demo)"
    )
    flags.add_argument(
        "--quick",
        type=int,
        default=1,
        metavar="K",
        help="divide every number of steps by K, to try the machinery",
    )
    given = flags.parse_args()
    started = time.monotonic()
    build(given.output, given.work, given.quick)
    print(
        f"{given.output} is complete ({(time.monotonic() - started) / 60:.0f} min). "
        f"Check it with: python -m scripts.demo_world.gate {given.output}; "
        "train the demonstration's ensemble again with: python -m scripts.demo_world.ensemble"
    )


def build(output: Path, work: Path, quick: int = 1) -> None:
    """Make the scorer, the shared parts, the base and the experts, in this order.

    The scorer comes first, so that it is fixed before any expert has drawn an image.
    quick: divides every number of training steps and images.
    """
    work.mkdir(parents=True, exist_ok=True)
    judge = parts.build_scorer(work, quick)
    tokenizer = parts.build_tokenizer(work / "tokenizer")
    shared = denoisers.Parts(
        tokenizer, parts.build_text_encoder(tokenizer, work, quick), parts.build_autoencoder(work, quick)
    )
    shared.text_encoder.requires_grad_(False)
    torch.manual_seed(4)
    base = denoisers.new_unet()
    _train("base", "union", base, shared.text_encoder, BASE, shared, work, quick)
    _save(output / "base", base, shared.text_encoder, shared)
    for index, name in enumerate(("curves", "angles", "patterns")):
        unet, text = copy.deepcopy(base).requires_grad_(True), copy.deepcopy(shared.text_encoder)
        text.requires_grad_(name == OWN_TEXT_ENCODER)
        _train(name, name, unet, text, EXPERT, shared, work, quick, seed=index + 1)
        _save(output / name, unet, text, shared)
    save_file(judge.state_dict(), output / "scorer.safetensors")
    halves = {name: tensor.half() for name, tensor in parts.build_reward(work, quick).state_dict().items()}
    save_file(halves, output / "reward.safetensors")
    records = {file.stem: json.loads(file.read_text()) for file in sorted(work.glob("*.json"))}
    (output / "build.json").write_text(json.dumps(records, indent=1) + "\n")


def _train(
    name: str,
    domain: str,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    schedule: Schedule,
    shared: denoisers.Parts,
    work: Path,
    quick: int,
    seed: int = 0,
) -> None:
    schedule = Schedule(
        schedule.steps // quick, schedule.rate, schedule.batch, schedule.average, schedule.warm_up
    )
    data = denoisers.training_set(domain, 12000 // quick, seed + 20, shared, work)
    null = parts.token_ids(shared.tokenizer, [""])
    denoisers.train_denoiser(name, unet, text, data, null, schedule, work)


def _save(folder: Path, unet: UNet2DConditionModel, text: CLIPTextModel, shared: denoisers.Parts) -> None:
    """A Stable Diffusion folder in half precision."""
    halves: list[nn.Module] = [copy.deepcopy(part).half() for part in (unet, text, shared.vae)]
    pipeline = StableDiffusionPipeline(
        unet=halves[0],
        text_encoder=halves[1],
        vae=halves[2],
        tokenizer=shared.tokenizer,
        scheduler=denoisers.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)


if __name__ == "__main__":
    main()
