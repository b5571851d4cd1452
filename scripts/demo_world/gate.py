"""`python -m scripts.demo_world.gate`: check the experts and the scorer of the embedded world.

Every expert must be good on its own domain and clearly worse on mixed scenes. The scorer must be exact on
real renders, clean and degraded. The exit code is 1 if a check fails.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from afa.demo.data import ASSETS, EXPERTS
from afa.demo.scenes import render_all, sample_scenes
from afa.demo.scorer import AttributeScorer
from afa.ensemble import Ensemble
from afa.sampling.sample import Request, Sampling, sample_all
from afa.stats import Estimate, estimate
from scripts.demo_world.parts import degrade, sample_everything

SAMPLING = Sampling(steps=20, guidance=3.0)  # with the experts' own DDIM
OWN_LEAST, GAP_LEAST = 0.80, 0.10
CLEAN_LEAST, DEGRADED_LEAST = 0.97, 0.90
UNSEEN = 900_000  # seeds of scenes no model was trained on


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m scripts.demo_world.gate", description=__doc__)
    flags.add_argument(
        "folder", type=Path, nargs="?", default=ASSETS, help="the world (default: the embedded one)"
    )
    flags.add_argument("--count", type=int, default=96, help="scenes per domain and expert (default: 96)")
    given = flags.parse_args()
    scorer = AttributeScorer.load(given.folder / "scorer.safetensors")
    passed = [
        _scorer(scorer),
        *(_expert(name, given.folder, scorer, given.count) for name in ("base", *EXPERTS)),
    ]
    print("the world passes" if all(passed) else "the world does NOT pass")
    sys.exit(0 if all(passed) else 1)


def _scorer(scorer: AttributeScorer, count: int = 1000) -> bool:
    """Check the attribute accuracy on unseen real renders of all domains, clean and degraded."""
    scenes = sample_everything(count, UNSEEN)
    captions = [scene.caption for scene in scenes]
    clean = np.stack(list(render_all(scenes, UNSEEN)))
    pixels = torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 127.5 - 1
    spoilt = (
        ((degrade(pixels, torch.Generator().manual_seed(0)) + 1) * 127.5)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .numpy()
    )
    passed = True
    for name, images, least in (("clean", clean, CLEAN_LEAST), ("degraded", spoilt, DEGRADED_LEAST)):
        accuracy = estimate(scorer.score(images, captions)["attributes"])
        passed &= _say(f"scorer, {name} renders", accuracy, accuracy.value >= least, f"at least {least:.2f}")
    return passed


def _expert(name: str, folder: Path, scorer: AttributeScorer, count: int) -> bool:
    """Check that an expert is good at home and clearly worse on mixed scenes; a base is only shown."""
    domains = ("union", "mixed") if name == "base" else (name, "mixed")
    scores = {domain: domain_scores(folder / name, domain, scorer, count) for domain in domains}
    own, mixed = (estimate(values) for values in scores.values())
    if name == "base":
        return _say("base on all domains", own, True, "shown only") and _say(
            "base on mixed", mixed, True, "shown only"
        )
    gap = _gap(*scores.values())
    good = _say(f"{name} on {name}", own, own.value >= OWN_LEAST, f"at least {OWN_LEAST:.2f}")
    _say(f"{name} on mixed", mixed, True, "shown only")
    return (
        _say(f"{name}: own minus mixed", gap, gap.low >= GAP_LEAST, f"interval above {GAP_LEAST:.2f}")
        and good
    )


def domain_scores(expert: Path, domain: str, scorer: AttributeScorer, count: int) -> NDArray[np.float64]:
    """Return the attribute accuracy of each image that an expert draws of unseen scenes: (count,)."""
    pipeline = Ensemble.from_experts([str(expert)], aggregator="mean").pipeline()
    pipeline.set_progress_bar_config(disable=True)
    captions = [scene.caption for scene in sample_scenes(domain, count, UNSEEN)]
    requests = [Request(caption, seed) for seed, caption in enumerate(captions)]
    images = np.concatenate(list(sample_all(pipeline, requests, SAMPLING, batch_size=32)))
    return scorer.score(images, captions)["attributes"]


def _gap(own: NDArray[np.float64], mixed: NDArray[np.float64]) -> Estimate:
    """Estimate the difference of two independent means by bootstrap."""
    rng = np.random.default_rng(0)
    draws = [values[rng.integers(len(values), size=(10_000, len(values)))].mean(1) for values in (own, mixed)]
    low, high = np.quantile(draws[0] - draws[1], (0.025, 0.975))
    return Estimate(float(own.mean() - mixed.mean()), float(low), float(high), len(own))


def _say(what: str, value: Estimate, passed: bool, asked: str) -> bool:
    print(f"{'ok  ' if passed else 'FAIL'}  {what:<28} {value}  n = {value.n}  ({asked})", flush=True)
    return passed


if __name__ == "__main__":
    main()
