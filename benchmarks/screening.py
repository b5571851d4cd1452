"""Does the head-room that `afa screen` measures foretell what training then gains? Expert sets of the embedded world, screened and trained.

    python benchmarks/screening.py --output build/screening

For every set: screen it on 64 scenes; train AFA and a prediction router as the demonstration does (fewer steps); judge both, every
expert and the weight average on 96 scenes that neither has seen, each with one noise in every band of timesteps. Prints one row a set, the
rank correlations over sets with bootstrap intervals, and a fit of the gain on the head-room; --calibrate keeps that fit for `afa screen`.
Experts that the world does not hold are made from those it does, by arithmetic on weights. Interrupted, the same command goes on.
"""

import argparse
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa.checkpoint.staging import write_atomically
from afa.demo.draw import draw
from afa.demo.methods import training
from afa.demo.run import TEST_SCENES, TRAINING_SCENES
from afa.demo.settings import DemoSettings
from afa.demo.world import BASE, EXPERTS
from afa.ensemble import Ensemble
from afa.latents import latents_of
from afa.screening.alone import Common
from afa.screening.asking import Asking
from afa.screening.data import encoded
from afa.training.noise import Noising

JUDGED = 96
WEAK = 0.06  # noise on weights, in standard deviations of each tensor: worse, not broken
NEAR = 0.002  # as much as rounding might do

# expert -> how its weights are made: shares of others, and noise on them
MADE: dict[str, tuple[dict[str, float], float]] = {
    "curves-copy": ({"curves": 1.0}, 0.0),
    "curves-near": ({"curves": 1.0}, NEAR),
    "patterns-near": ({"patterns": 1.0}, NEAR),
    "curves-weak": ({"curves": 1.0}, WEAK),
    "angles-weak": ({"angles": 1.0}, WEAK),
    "patterns-weak": ({"patterns": 1.0}, WEAK),
    "curves-half": ({"curves": 0.5, "base": 0.5}, 0.0),
    "angles-half": ({"angles": 0.5, "base": 0.5}, 0.0),
    "patterns-half": ({"patterns": 0.5, "base": 0.5}, 0.0),
    "curves-angles": ({"curves": 0.5, "angles": 0.5}, 0.0),
}
SETS = {
    "three good ones": ["curves", "angles", "patterns"],
    "curves and angles": ["curves", "angles"],
    "curves and patterns": ["curves", "patterns"],
    "angles and patterns": ["angles", "patterns"],
    "a duplicate": ["curves", "curves-copy"],
    "a near-duplicate": ["curves", "curves-near"],
    "a near-duplicate of the best": ["patterns", "patterns-near"],
    "two and a duplicate": ["curves", "angles", "curves-copy"],
    "the best and its base": ["patterns", "base"],
    "a narrow one and its base": ["curves", "base"],
    "two narrow ones and their base": ["curves", "angles", "base"],
    "a weak copy": ["curves", "curves-weak"],
    "a weak copy of the best": ["patterns", "patterns-weak"],
    "the best and two weak ones": ["patterns", "curves-weak", "angles-weak"],
    "two weak ones": ["curves-weak", "angles-weak"],
    "half-way copies": ["curves", "curves-half"],
    "three half-way": ["curves-half", "angles-half", "patterns-half"],
    "the best and a merge": ["patterns", "curves-angles"],
    "the best, half-way": ["patterns", "patterns-half"],
    "a narrow one and half of another": ["curves", "angles-half"],
}


def make_experts(folder: Path) -> dict[str, Path]:
    """Every expert's folder; those of MADE are written once."""
    places = {"base": BASE, **EXPERTS}
    for seed, (name, (shares, noise)) in enumerate(MADE.items()):
        place = folder / name
        if not (place / "model_index.json").exists():
            _write(place, [(places[source], share) for source, share in shares.items()], noise, seed)
        places[name] = place
    return places


def _write(place: Path, sources: list[tuple[Path, float]], noise: float, seed: int) -> None:
    """A weighted sum of denoisers, with noise on it; text encoder and the rest are the first source's."""
    from diffusers import UNet2DConditionModel

    models = [UNet2DConditionModel.from_pretrained(source, subfolder="unet") for source, _ in sources]
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for same in zip(*(model.parameters() for model in models), strict=True):
            mixed = sum(share * tensor for (_, share), tensor in zip(sources, same, strict=True))
            spread = mixed.std() if mixed.numel() > 1 else mixed.abs()
            same[0].copy_(mixed + noise * spread * torch.randn(mixed.shape, generator=rng))
    stage = place.with_name(f".{place.name}")
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(sources[0][0], stage, ignore=shutil.ignore_patterns("unet"))
    models[0].save_pretrained(stage / "unet")
    stage.rename(place)


def judge(ensemble: Ensemble, data: Path) -> list[list[float]]:
    """Squared errors by image and band on scenes nobody has seen, the noise always the same: (JUDGED, BANDS)."""
    cpu, vae = torch.device("cpu"), ensemble.frame.vae
    common = Common(vae, ensemble.frame.scheduler, None, None, torch.float32, cpu)
    noising = Noising(common.scheduler, latents_of(vae), cpu)
    resolution = ensemble.denoiser.side * latents_of(vae).factor
    probes = encoded(str(data), vae, noising, images=JUDGED, draws=1, seed=99, resolution=resolution)
    asking = Asking(ensemble, common.conditions(ensemble), noising, probes, batch_size=4)
    return [asking.ask(image).errors.square().mean((1, 2, 3, 4)).tolist() for image in range(JUDGED)]


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; made and written if it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(make()))
    return json.loads(file.read_text())


def trained(sources: list[str], folder: Path, placement: str, work: Path, steps: int, seed: int) -> Ensemble:
    from afa.training.run import train

    settings = DemoSettings(output=str(work), train_steps=steps, seed=seed)
    train(replace(training(settings, folder, placement, sources), held_out=16, evaluate_every=steps))
    return Ensemble.load(folder)


def realised(name: str, places: dict[str, Path], work: Path, steps: int, seed: int) -> dict[str, Any]:
    """Losses of AFA, the router, every expert and the weight average, each (JUDGED, BANDS)."""
    from afa.demo.methods import weight_average

    experts, folder = SETS[name], work / "sets" / f"{name.replace(' ', '-')}-{seed}"
    sources = [f"{expert}={places[expert]}" for expert in experts]
    test = work / "test"

    def alone(expert: str) -> list[list[float]]:
        return judge(Ensemble.from_experts([str(places[expert])], aggregator="mean"), test)

    losses = {expert: kept(work / "judged" / f"{expert}.json", functools.partial(alone, expert)) for expert in experts}
    average = kept(folder / "average.json", lambda: judge(weight_average([str(places[expert]) for expert in experts]), test))
    router = kept(folder / "router.json", lambda: judge(trained(sources, folder / "router", "out", work, steps, seed), test))
    afa = kept(folder / "afa.json", lambda: judge(trained(sources, folder / "afa", "layers", work, steps, seed), test))
    return {"experts": losses, "average": average, "router": router, "afa": afa}


def main() -> None:
    flags = argparse.ArgumentParser(prog="python benchmarks/screening.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, default=Path("build/screening"))
    flags.add_argument("--steps", type=int, default=150, help="training steps (default: 150)")
    flags.add_argument("--seeds", type=int, default=1, help="training seeds a set (default: 1)")
    given = flags.parse_args()
    work: Path = given.output
    for folder, count, seed in (("data", 512, TRAINING_SCENES), ("test", JUDGED, TEST_SCENES + 50_000)):
        if not (work / folder).exists():
            draw(work / folder, "mixed", count, seed)
    places = make_experts(work / "experts")
    for seed in range(given.seeds):
        for name in SETS:
            found = realised(name, places, work, given.steps, seed)
            best = min(np.mean(losses) for losses in found["experts"].values())
            shown = {key: round(1 - float(np.mean(found[key])) / best, 4) for key in ("afa", "router", "average")}
            print(f"{name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
