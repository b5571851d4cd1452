"""How much of an ensemble's gain does one distilled model keep? Students and controls, compared on scenes that no comparison judges.

    python benchmarks/distil.py --world far --output build/distil --student "whole" --student "lora lora=32 student=curves" \\
        --control "LoRA on the merge rank=32 steps=1000 batch-size=32" --seeds 4

A student is a name and options of `afa distill`, a control a name and options of `afa finetune` on the weight average, with _ or - in names.
The teacher is AFA as `afa demo` trains it (far: demo:ensemble; near: trained here first), drawn in 20 steps at guidance 3; students with
guidance_in are drawn at guidance 1. All draw the same scenes from the same noise. Prints attribute accuracy (near: the attributes'
probability), its difference to the weight average and to AFA, and the share of the gain that is kept, with intervals over scenes and
training seeds. Interrupted, the same command goes on.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray
from variants import IMAGES, Bench, pipeline_of

from afa.demo.draw import draw
from afa.demo.run import AGGREGATORS
from afa.demo.worlds import WORLDS
from afa.distillation.run import distill
from afa.distillation.settings import DistillSettings
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.lora import fuse
from afa.files import write_atomically
from afa.fingerprint import digest
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings
from afa.sampling.sample import Sampler
from afa.settings import kind_of
from afa.stats import difference, differences, estimate, estimates, kept_share
from afa.training.finetune import FILE, finetune
from afa.training.finetune_settings import LoraSettings
from afa.training.run import train
from afa.training.settings import TrainSettings

GUIDANCE = 3.0


def options_of(text: str, settings: type) -> tuple[str, dict[str, Any]]:
    """Parse "a name option=value …" into the name and options of a command. Raises UserError."""
    words = text.split()
    known, options = get_type_hints(settings), {}
    name = " ".join(word for word in words if "=" not in word)
    for word in (word for word in words if "=" in word):
        key, _, value = word.partition("=")
        key = key.replace("-", "_")
        if key not in known:
            raise UserError(f"{name}: '{word}' is no option of {settings.__name__}")
        kind, _ = kind_of(known[key])
        options[key] = value == "True" if kind is bool else kind(value)
    return name, options


class Distilling(Bench):
    """Trains students and controls of a world, and draws with them."""

    def teacher(self) -> Path:
        """The place of the ensemble."""
        if self.world.name == "far":
            return self.world.folder("ensemble")
        folder = self.work / "teacher"
        train(
            TrainSettings(
                data=str(self.pictures()), output=str(folder), experts=self.experts, held_out=48, steps=280, ema=0.98, **AGGREGATORS
            )
        )
        return folder

    def pictures(self) -> Path:
        """The images that everything trains on; students read their captions alone."""
        data = self.work / f"data-{self.images}"
        if not data.exists():
            draw(data, "mixed", self.images, IMAGES, self.world)
        return data

    def merged(self) -> Path:
        """The weight average as a folder."""
        folder = self.work / "merged"
        if not folder.exists():
            merge_files(MergeSettings(experts=self.experts, output=str(folder)))
        return folder

    def student(self, options: dict[str, Any], seed: int) -> Path:
        """Distil, or find what was distilled: the folder."""
        folder = self.work / "students" / f"{digest(options)[:8]}-{seed}"
        given = {"data": str(self.pictures()), "guidance": None if "guidance_in" in options else GUIDANCE, **options}
        distill(DistillSettings(ensemble=str(self.teacher()), output=str(folder), seed=seed, **given))
        return folder

    def control(self, options: dict[str, Any], seed: int) -> Path:
        """Tune the weight average without a teacher: the folder."""
        folder = self.work / "controls" / f"{digest(options)[:8]}-{seed}"
        finetune(LoraSettings(expert=str(self.merged()), data=str(self.pictures()), output=str(folder), seed=seed, **options))
        return folder

    def sampler(self, place: Path, base: Path | str) -> Sampler:
        """Draw with a student's folder, or with a LoRA on a base."""
        if not (place / FILE).exists():
            return pipeline_of(Ensemble.from_experts([str(place)], aggregator="mean", placement="out"))
        expert = Ensemble.from_experts([f"tuned={base}+{place / FILE}"], aggregator="mean", placement="out").experts[0]
        fuse(expert.model)
        return pipeline_of(Ensemble.from_experts([expert], aggregator="mean", placement="out"))


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python benchmarks/distil.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--world", choices=list(WORLDS), default="far", help="default: far")
    flags.add_argument("--output", type=Path, default=Path("build/distil"))
    flags.add_argument("--student", action="append", default=[], help="a name and options of afa distill; may be repeated")
    flags.add_argument("--control", action="append", default=[], help="a name and options of afa finetune; may be repeated")
    flags.add_argument("--scenes", type=int, default=160, help="scenes that all draw (default: 160)")
    flags.add_argument("--images", type=int, default=512, help="training images (default: 512)")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default: 0)")
    given = flags.parse_args()
    bench = Distilling(WORLDS[given.world], given.output / given.world, given.scenes, given.images)
    lead = bench.scores[-1]

    def scores(name: str, make: Callable[[], Sampler], guidance: float = GUIDANCE) -> NDArray[np.float64]:
        return bench.scorer.score(bench.drawn(name, make, guidance), bench.captions)[lead]

    merge = scores("weight average", bench.average)
    teacher = scores("AFA", lambda: pipeline_of(Ensemble.load(bench.teacher())))
    lines = [
        f"{lead}, {given.world}, n = {given.scenes} scenes, training seeds {' '.join(map(str, given.seeds))}\n",
        "| model | score | minus weight average | minus AFA | share of the gain kept |",
        "|---|---|---|---|---|",
        f"| weight average | {estimate(merge)} | | {difference(merge, teacher)} | |",
        f"| AFA, three experts | {estimate(teacher)} | {difference(teacher, merge)} | | |",
    ]
    trained = [(options_of(text, DistillSettings), bench.student) for text in given.student]
    trained += [(options_of(text, LoraSettings), bench.control) for text in given.control]
    for (name, options), make in trained:
        base = str(bench.world.folder(options["student"])) if options.get("student") in bench.world.experts else bench.merged()
        guidance = 1.0 if options.get("guidance_in") else GUIDANCE
        runs = []
        for seed in given.seeds:
            place = make(options, seed)
            runs.append(scores(place.name, lambda place=place, base=base: bench.sampler(place, base), guidance))
        found = np.stack(runs)
        cells = [*estimates([found]), *differences([found - merge, found - teacher]), kept_share(found, merge[None], teacher[None])]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    report = "\n".join(lines)
    write_atomically(given.output / given.world / "table.md", report + "\n")
    print(report)


if __name__ == "__main__":
    main()
