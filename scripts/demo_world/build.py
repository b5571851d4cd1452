"""`python -m scripts.demo_world.build far|near`: make an embedded world.

The far world is made from nothing, and the near one with the far one's VAE. Each takes less than two hours on
two cores. It may be interrupted: the same command continues.
"""

import argparse
import copy
import functools
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from afa.demo.worlds import FAR
from scripts.demo_world import denoisers, parts
from scripts.demo_world.fit import Schedule
from scripts.demo_world.worlds import PLANS, WorldPlan


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m scripts.demo_world.build", description=__doc__)
    flags.add_argument("world", nargs="?", choices=list(PLANS), default="far", help="default: far")
    flags.add_argument(
        "--output", type=Path, default=Path("demo-world"), help="where the world goes (default: demo-world)"
    )
    flags.add_argument("--work", type=Path, help="training states (default: build/demo, build/demo-near)")
    flags.add_argument(
        "--quick",
        type=int,
        default=1,
        metavar="K",
        help="divide every number of steps by K, to try the machinery",
    )
    given = flags.parse_args()
    started = time.monotonic()
    plan = PLANS[given.world]
    work = given.work or Path("build/demo" if given.world == "far" else f"build/demo-{given.world}")
    build(plan, given.output, work, given.quick)
    print(
        f"{given.output} is complete ({(time.monotonic() - started) / 60:.0f} min). "
        f"Check it with: python -m scripts.demo_world.gate {given.world} {given.output}"
        + (
            "; train the demonstration's ensemble again with: python -m scripts.demo_world.ensemble"
            if given.world == "far"
            else ""
        )
    )


def build(plan: WorldPlan, output: Path, work: Path, quick: int = 1) -> None:
    """Make the scorer, the shared parts, the base and the experts, in this order.

    The scorer comes first, so that it is fixed before any expert has drawn an image.
    quick: divides every number of training steps and images.
    """
    work.mkdir(parents=True, exist_ok=True)
    judge = parts.build_scorer(plan, work, quick)
    tokenizer = parts.build_tokenizer(plan, work / "tokenizer")
    text_encoder = parts.build_text_encoder(plan, tokenizer, work, quick)
    vae = parts.build_autoencoder(work, quick) if plan.world is FAR else embedded_vae()
    shared = denoisers.Parts(tokenizer, text_encoder, vae)
    shared.text_encoder.requires_grad_("base" in plan.tunes_text)
    torch.manual_seed(4)
    base = plan.unet()
    training = functools.partial(_train, plan, shared, work, quick)
    training("base", "union", base, shared.text_encoder, plan.base_steps)
    _save(output / f"{plan.world.prefix}base", base, shared.text_encoder, shared)
    for seed, (name, domain) in enumerate(plan.domains.items(), 1):
        unet, text = copy.deepcopy(base).requires_grad_(True), copy.deepcopy(shared.text_encoder)
        text.requires_grad_(name in plan.tunes_text)
        training(name, domain, unet, text, plan.expert_steps, seed)
        _save(output / f"{plan.world.prefix}{name}", unet, text, shared)
    for name, net in (("scorer", judge), ("reward", parts.build_reward(plan, work, quick))):
        halves = {key: tensor.half() for key, tensor in net.state_dict().items()}
        # What has judged the far world since its first comparison stays as it is.
        exact = name == "scorer" and plan.world is FAR
        save_file(net.state_dict() if exact else halves, output / f"{plan.world.prefix}{name}.safetensors")
    records = {file.stem: json.loads(file.read_text()) for file in sorted(work.glob("*.json"))}
    (output / f"{plan.world.prefix}build.json").write_text(json.dumps(records, indent=1) + "\n")


def embedded_vae() -> AutoencoderKL:
    """Load the far world's VAE, which all worlds share; its config does not say where it was loaded from."""
    folder = FAR.folder("base") / "vae"
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval().requires_grad_(False)


def _train(
    plan: WorldPlan,
    shared: denoisers.Parts,
    work: Path,
    quick: int,
    name: str,
    domain: str,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    schedule: Schedule,
    seed: int = 0,
) -> None:
    data = denoisers.training_set(
        plan, domain, plan.training[name != "base"] // quick, seed + 20, shared, work
    )
    null = parts.token_ids(shared.tokenizer, [""])
    denoisers.train_denoiser(name, unet, text, data, null, schedule.divided(quick), work)


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
