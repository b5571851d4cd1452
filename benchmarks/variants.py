"""What makes a trained ensemble better? Variants of a training, compared on scenes that no comparison judges.

    python benchmarks/variants.py --world near --output build/variants --guidance 1.5 3 5 \\
        --variant "stitch aggregator=stitch hidden=32 heads=4 depth=1 lr=2e-3 steps=250" --variant "sabw lr=1e-3"

A variant is a name and options of `afa train`, with _ for -, such as experts=a,b for other models than the world's; all train on the same
images. Beside them stand the experts, the weight
average, the noise average, the untrained mean and MagicFusion. All draw the same scenes from the same noise at every guidance. Prints, for
each guidance, attribute accuracy (and on near the probability of the attributes), their differences to the weight average paired by scene,
and the Fréchet distance; and the held-out loss. With --model, all are also compared with other models, such as a searched merge.
These scenes choose options, so they prove nothing: `afa evaluate` judges others. Interrupted, the same command goes on.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from afa.demo.data import REAL, REAL_SCENES
from afa.demo.draw import draw
from afa.demo.metric import Frechet
from afa.demo.worlds import WORLDS, World, load_scorer
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.files import write_atomically
from afa.fingerprint import digest
from afa.merging.memory import InMemoryMerge
from afa.sampling.registry import make_sampler
from afa.sampling.sample import Request, Sampler, Sampling, sample
from afa.settings import kind_of
from afa.stats import difference, estimate
from afa.training.run import train
from afa.training.settings import TrainSettings

SEED, IMAGES = 650_000, 640_000  # of the scenes that are drawn, and of the training images
BATCH = 32
UNTRAINED = ("noise_average", "feature_mean", "magicfusion")


class Bench:
    """Draws the same scenes by any method, and keeps what was drawn.

    scenes: number of scenes
    """

    def __init__(self, world: World, work: Path, scenes: int, images: int) -> None:
        self.world, self.work, self.images = world, work, images
        self.captions = [scene.caption for scene in world.sample("mixed", scenes, SEED)]
        self.scorer = load_scorer(world)
        self.scores = [score for score in ("attributes", "probability") if score in world.scores]
        self.frechet = Frechet(world, "frechet")
        real = np.stack(list(world.render_all(world.sample("mixed", REAL_SCENES, REAL), REAL)))
        self.reference = self.frechet.prepare(self.scorer.features(real))
        self.experts = [str(world.folder(name)) for name in world.experts]

    def drawn(self, name: str, make: Callable[[], Sampler], guidance: float) -> NDArray[np.uint8]:
        """Return a method's images at one guidance: (scenes, 64, 64, 3)."""
        file = self.work / "drawn" / f"{name}-{guidance:g}-{len(self.captions)}.npy"
        if not file.exists():
            sampler, sampling = make(), Sampling(steps=20, guidance=guidance)
            asked = [Request(caption, seed) for seed, caption in enumerate(self.captions)]
            parts = [sampler(asked[k : k + BATCH], sampling) for k in range(0, len(asked), BATCH)]
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part.npy")
            np.save(part, np.concatenate(parts))
            part.replace(file)
        images: NDArray[np.uint8] = np.load(file)
        return images

    def average(self) -> Sampler:
        """Return the weight average of the experts."""
        experts = [Ensemble.from_experts([place]).experts[0] for place in self.experts]
        merged = InMemoryMerge(experts).apply("weighted")
        return pipeline_of(Ensemble.from_experts([merged], aggregator="mean", placement="out"))

    def untrained(self) -> dict[str, Callable[[], Sampler]]:
        """Return what is compared with, by name."""
        methods: dict[str, Callable[[], Sampler]] = {"weight average": self.average}
        for name, place in zip(self.world.experts, self.experts, strict=True):
            methods[name] = lambda place=place: pipeline_of(Ensemble.from_experts([place], aggregator="mean"))
        for name in UNTRAINED:
            methods[name] = lambda name=name: make_sampler(name, Ensemble.from_experts(self.experts))
        return methods

    def trained(self, name: str, options: dict[str, Any]) -> tuple[str, Ensemble]:
        """Train a variant, or load it: its name with a mark of its options, and the ensemble."""
        data, mark = self.work / f"data-{self.images}", f"{name}-{digest(options)[:8]}"
        if not data.exists():
            draw(data, "mixed", self.images, IMAGES, self.world)
        folder = self.work / "trained" / mark
        train(TrainSettings(data=str(data), output=str(folder), **{"experts": self.experts, **options}))
        return mark, Ensemble.load(folder)


def pipeline_of(ensemble: Ensemble, shared: bool = False) -> Sampler:
    """Return a sampler of an ensemble's stock pipeline. shared: one set of weights for both passes of guidance."""
    pipeline = ensemble.pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def draw_all(requests: Sequence[Request], sampling: Sampling) -> NDArray[np.uint8]:
        ensemble.denoiser.share_guidance_weights = shared
        return sample(pipeline, requests, sampling)

    return draw_all


def options_of(text: str) -> tuple[str, dict[str, Any]]:
    """Parse "NAME option=value …" into a name and options of TrainSettings. Raises UserError."""
    name, *words = text.split()
    known = get_type_hints(TrainSettings)
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise UserError(f"--variant {name}: '{word}' is no option=value of `afa train`")
        kind, several = kind_of(known[key])
        found = [part == "True" if kind is bool else kind(part) for part in value.split(",")]
        options[key] = found if several else found[0]
    return name, options


def table(bench: Bench, methods: dict[str, Callable[[], Sampler]], models: Sequence[str], guidance: float, losses: dict[str, str]) -> str:
    """Return the table of one guidance, as Markdown. models: names of the methods that all others are compared with, besides the average"""
    lines = [
        f"\nguidance {guidance:g}, n = {len(bench.captions)} scenes\n",
        f"| method | {' | '.join(f'{score} | minus weight average' for score in bench.scores)} | Fréchet | held-out loss |"
        + "".join(f" {bench.scores[-1]} minus {name} |" for name in models),
        f"|---{'|---|---' * len(bench.scores)}|---|---|{'---|' * len(models)}",
    ]
    others = {name: bench.scorer.score(bench.drawn(name, methods[name], guidance), bench.captions) for name in models}
    base: dict[str, NDArray[np.float64]] = {}
    for name, make in methods.items():
        images = bench.drawn(name, make, guidance)
        found = bench.scorer.score(images, bench.captions)
        cells = [name]
        for score in bench.scores:
            lead = str(difference(found[score], base[score])) if base else ""
            cells += [str(estimate(found[score])), lead]
        base = base or found
        distance = bench.frechet.value(bench.scorer.features(images), bench.reference)
        leads = "".join(f" {difference(found[bench.scores[-1]], other[bench.scores[-1]])} |" for other in others.values())
        lines.append(f"| {' | '.join(cells)} | {distance:.1f} | {losses.get(name, '')} |{leads}")
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python benchmarks/variants.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--world", choices=list(WORLDS), default="near", help="default: near")
    flags.add_argument("--output", type=Path, default=Path("build/variants"))
    flags.add_argument("--variant", action="append", default=[], help="a name and options; may be repeated")
    flags.add_argument("--model", action="append", default=[], help="NAME=PLACE of a model to compare with; may be repeated")
    flags.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    flags.add_argument("--scenes", type=int, default=160, help="scenes that all draw (default: 160)")
    flags.add_argument("--images", type=int, default=512, help="training images (default: 512)")
    flags.add_argument("--shared", action="store_true", help="draw each also with --shared-guidance-weights")
    given = flags.parse_args()
    bench = Bench(WORLDS[given.world], given.output / given.world, given.scenes, given.images)
    methods, losses = bench.untrained(), {}
    models = dict(model.partition("=")[::2] for model in given.model)
    for name, place in models.items():
        methods[name] = lambda place=place: pipeline_of(Ensemble.from_experts([place], aggregator="mean"))
    for text in given.variant:
        name, options = options_of(text)
        mark, ensemble = bench.trained(name, options)
        methods[mark] = lambda ensemble=ensemble: pipeline_of(ensemble)
        if given.shared:
            methods[f"{mark} shared"] = lambda ensemble=ensemble: pipeline_of(ensemble, shared=True)
        held_out = (ensemble.training or {}).get("held_out_loss", {}).get("trained", {})
        losses[mark] = f"{held_out.get('value', float('nan')):.5f}"
    report = "\n".join(table(bench, methods, list(models), guidance, losses) for guidance in given.guidance)
    write_atomically(given.output / given.world / "table.md", report + "\n")
    print(report)
    (given.output / given.world / "variants.json").write_text(json.dumps(given.variant, indent=1) + "\n")


if __name__ == "__main__":
    main()
