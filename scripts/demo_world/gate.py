"""`python -m scripts.demo_world.gate far|near`: check the experts and the scorer of an embedded world.

far: every expert must be good on its own domain and clearly worse on mixed scenes.
near: the base must master single things; every expert must be better at home than the base and the other
experts; their weight average must be as good as the best expert on mixed scenes; and their weights must lie as
near each other as those of community fine-tunes.
In both the scorer must be exact on real renders, clean and degraded. The exit code is 1 if a check fails.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from afa.demo.worlds import WORLDS, SceneScorer, World, load_network
from afa.ensemble import Ensemble
from afa.merging.memory import InMemoryMerge
from afa.places import ASSETS
from afa.sampling.sample import Request, Sampling, sample_all
from afa.stats import Estimate, difference, estimate
from scripts.demo_world.parts import degrade
from scripts.demo_world.worlds import PLANS

SAMPLING = Sampling(steps=20, guidance=3.0)  # with the experts' own DDIM
OWN_LEAST, GAP_LEAST = 0.80, 0.10  # far: attribute accuracy at home, and how much lower it is on mixed scenes
SINGLE_LEAST = 0.90  # near: the base's attribute accuracy on single things
DISTANCES = (0.05, 0.15)  # near: of weights, relative to the base's
CLEAN_LEAST, DEGRADED_LEAST = 0.97, 0.90
UNSEEN = 900_000  # seeds of scenes no model was trained on


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m scripts.demo_world.gate", description=__doc__)
    flags.add_argument("world", nargs="?", choices=list(WORLDS), default="far", help="default: far")
    flags.add_argument(
        "folder", type=Path, nargs="?", default=ASSETS, help="of its models (default: the embedded ones)"
    )
    flags.add_argument("--count", type=int, default=96, help="scenes of a domain (default: 96)")
    given = flags.parse_args()
    gate = Gate(WORLDS[given.world], given.folder, given.count)
    passed = list(gate.checks())
    print("the world passes" if all(passed) else "the world does NOT pass")
    sys.exit(0 if all(passed) else 1)


class Gate:
    """Checks one world.

    folder: of its models
    count:  of scenes for each expert and domain
    """

    def __init__(self, world: World, folder: Path, count: int) -> None:
        self.world, self.folder, self.count = world, folder, count
        net = load_network(world.network(), self.place("scorer").with_suffix(".safetensors"))
        self.scorer: SceneScorer = world.scorer(net)

    def place(self, name: str) -> Path:
        return self.folder / f"{self.world.prefix}{name}"

    def checks(self) -> Iterator[bool]:
        yield from self._scorer()
        yield from self._far() if self.world.name == "far" else self._near()

    def scores(self, ensemble: Ensemble, domain: str) -> NDArray[np.float64]:
        """Return the attribute accuracy of each image that is drawn of unseen scenes: (count,)."""
        pipeline = ensemble.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        captions = [scene.caption for scene in self.world.sample(domain, self.count, UNSEEN)]
        requests = [Request(caption, seed) for seed, caption in enumerate(captions)]
        images = np.concatenate(list(sample_all(pipeline, requests, SAMPLING, batch_size=32)))
        return self.scorer.score(images, captions)["attributes"]

    def one(self, name: str, domain: str) -> NDArray[np.float64]:
        """Return the scores of one model of the world."""
        return self.scores(Ensemble.from_experts([str(self.place(name))], aggregator="mean"), domain)

    def _scorer(self, count: int = 1000) -> Iterator[bool]:
        """Check the attribute accuracy on unseen real renders of all domains, clean and degraded."""
        scenes = PLANS[self.world.name].everything(count, UNSEEN)
        captions = [scene.caption for scene in scenes]
        clean = np.stack(list(self.world.render_all(scenes, UNSEEN)))
        pixels = torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 127.5 - 1
        spoilt = ((degrade(pixels, torch.Generator().manual_seed(0)) + 1) * 127.5).round().byte()
        degraded = spoilt.permute(0, 2, 3, 1).numpy()
        for name, images, least in (
            ("clean", clean, CLEAN_LEAST),
            ("degraded", degraded, DEGRADED_LEAST),
        ):
            accuracy = estimate(self.scorer.score(images, captions)["attributes"])
            yield _say(f"scorer, {name} renders", accuracy, accuracy.value >= least, f"at least {least:.2f}")

    def _far(self) -> Iterator[bool]:
        """Check that every expert is good at home and clearly worse on mixed scenes; the base is only shown."""
        for domain in ("union", "mixed"):
            yield _say(f"base on {domain}", estimate(self.one("base", domain)), True, "shown only")
        for name in self.world.experts:
            own, mixed = self.one(name, name), self.one(name, "mixed")
            gap, home = _gap(own, mixed), estimate(own)
            yield _say(f"{name} on {name}", home, home.value >= OWN_LEAST, f"at least {OWN_LEAST:.2f}")
            yield _say(f"{name} on mixed", estimate(mixed), True, "shown only")
            wide = gap.low >= GAP_LEAST
            yield _say(f"{name}: own minus mixed", gap, wide, f"interval above {GAP_LEAST:.2f}")

    def _near(self) -> Iterator[bool]:
        single = estimate(self.one("base", "single"))
        yield _say("base, one thing", single, single.value >= SINGLE_LEAST, f"at least {SINGLE_LEAST:.2f}")
        models = ("base", *self.world.experts)
        for home in self.world.experts:
            scores = {name: self.one(name, home) for name in models}
            for name, values in scores.items():
                yield _say(f"{name} on {home}", estimate(values), True, "shown only")
            for name in models:
                if name != home:
                    lead = difference(scores[home], scores[name])
                    yield _say(f"{home}: {home} minus {name}", lead, lead.low > 0, "interval above 0")
        yield from self._mixed()
        yield from self._distances()

    def _mixed(self) -> Iterator[bool]:
        """Check that the weight average is at least as good as the best expert where all families meet."""
        scores = {name: self.one(name, "mixed") for name in ("base", *self.world.experts)}
        average = InMemoryMerge(
            [Ensemble.from_experts([str(self.place(name))]).experts[0] for name in self.world.experts]
        ).apply("weighted")
        merged = self.scores(Ensemble.from_experts([average], aggregator="mean", placement="out"), "mixed")
        for name, values in {**scores, "weight average": merged}.items():
            yield _say(f"{name} on mixed", estimate(values), True, "shown only")
        best = max(self.world.experts, key=lambda name: scores[name].mean())
        lead = difference(merged, scores[best])
        yield _say(f"weight average minus {best}", lead, lead.value >= 0, "at least 0")

    def _distances(self) -> Iterator[bool]:
        """Check the distances of weights: |a - b| / |base| over all weights of the U-Net."""
        flat = {}
        for name in ("base", *self.world.experts):
            unet = UNet2DConditionModel.from_pretrained(self.place(name) / "unet")
            flat[name] = torch.cat([tensor.double().flatten() for tensor in unet.state_dict().values()])
        names, low, high = list(flat), *DISTANCES
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                far = ((flat[first] - flat[second]).norm() / flat["base"].norm()).item()
                passed = low <= far <= high
                print(f"{_mark(passed)}  {first} to {second:<18} {far:.3f}  ({low} to {high})", flush=True)
                yield passed


def _gap(own: NDArray[np.float64], mixed: NDArray[np.float64]) -> Estimate:
    """Estimate the difference of two independent means by bootstrap."""
    rng = np.random.default_rng(0)
    draws = [values[rng.integers(len(values), size=(10_000, len(values)))].mean(1) for values in (own, mixed)]
    low, high = np.quantile(draws[0] - draws[1], (0.025, 0.975))
    return Estimate(float(own.mean() - mixed.mean()), float(low), float(high), len(own))


def _mark(passed: bool) -> str:
    return "ok  " if passed else "FAIL"


def _say(what: str, value: Estimate, passed: bool, asked: str) -> bool:
    print(f"{_mark(passed)}  {what:<28} {value}  n = {value.n}  ({asked})", flush=True)
    return passed


if __name__ == "__main__":
    main()
