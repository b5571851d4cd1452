"""Quality against price: fewer steps, steps that are reused, and single experts, on scenes that no comparison judges.

    python benchmarks/speed.py --world far --ensemble demo:ensemble --way "exact steps=20" --way "exact steps=5" \\
        --way "inner stages reused steps=20 reuse=3" --way "one expert leads steps=20 reuse=8 lead=patterns" --way "expert steps=20 expert=patterns"

A way is a name and options: steps, guidance, scheduler, reuse, outer, lead and store as those of `afa generate`, expert for one expert
alone, and with it whole=.2,.7 for the whole ensemble between these shares of the steps (T-Stitch, arXiv:2402.14167);
guided=0,.6 for guidance between these shares only. Ways of one name are one line of the picture; the first way is what the others are
compared with, paired by scene. The price is counted in operations of the denoiser, and given relative to one expert in 20 steps;
seconds an image are of this machine while it drew. Interrupted, the same command goes on.
Writes table.md, and page.html with the picture (python docs/curves_picture.py page.html picture.png).
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from variants import BATCH, Bench

from afa.cost import Prices
from afa.demo.worlds import WORLDS
from afa.denoiser.hooks import only_expert
from afa.denoiser.reuse import Reuse
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.quantised import store_weights
from afa.files import write_atomically
from afa.pages.frontier import FrontierLine, FrontierSpot, frontier_plot
from afa.pages.page import style
from afa.sampling.sample import Request, Sampling, sample
from afa.schedulers import reschedule
from afa.stats import Estimate, difference, estimate

STEPS = 20  # of the one expert that prices are relative to


def shares(text: str) -> tuple[float, ...]:
    """Parse shares of the steps, such as .2,.7."""
    return tuple(float(part) for part in text.split(","))


OPTIONS: dict[str, Callable[[str], Any]] = {
    "steps": int, "guidance": float, "scheduler": str, "reuse": int, "outer": int, "lead": str, "expert": str, "store": str,
    "whole": shares, "guided": shares,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A way to draw. name: of its line; label: its options in words; the rest as in the module's text."""

    name: str
    label: str
    steps: int = STEPS
    guidance: float = 3.0
    scheduler: str | None = None
    reuse: int = 1
    outer: int = 2
    lead: str | None = None
    expert: str | None = None
    store: str | None = None
    whole: tuple[float, float] | None = None
    guided: tuple[float, float] | None = None

    @property
    def reused(self) -> Reuse | None:
        """What is reused between steps."""
        return Reuse(self.reuse, self.outer, self.lead) if self.reuse > 1 else None

    @property
    def short(self) -> str:
        """What tells it from the others of its line."""
        reused = "" if self.reuse == 1 else f", {-(-self.steps // self.reuse)} whole"
        parts = "".join(f", {what}{{:g}} to {{:g}}".format(*part) for what, part in (("", self.whole), ("guided ", self.guided)) if part)
        return f"{self.steps} steps{reused}{parts}{', ' + self.store if self.store else ''}"

    def is_alone(self, step: int) -> bool:
        """Return whether the expert is alone in a step, from 0."""
        return self.expert is not None and not (self.whole and self.whole[0] <= step / self.steps < self.whole[1])

    @classmethod
    def parse(cls, text: str) -> "Way":
        """Parse "name option=value …". Raises UserError."""
        words = text.split()
        options = [word for word in words if "=" in word]
        found = {}
        for word in options:
            key, _, value = word.partition("=")
            if key not in OPTIONS:
                raise UserError(f"--way '{text}': there is no option '{key}'; there are {', '.join(OPTIONS)}")
            found[key] = OPTIONS[key](value)
        label = " ".join(word.replace("=", " ") for word in options)
        return cls(" ".join(word for word in words if "=" not in word), label, **found)


def price(prices: Prices, way: Way) -> float:
    """Return the price of an image, relative to one expert in STEPS steps."""
    if way.expert:
        total = sum(1.0 if way.is_alone(step) else prices.all / prices.one for step in range(way.steps))
    else:
        total = prices.of(way.steps, way.reused, way.guided or (0.0, 1.0))
    return total / STEPS


class Draw:
    """Draws the scenes in all ways, and keeps what was drawn, with its seconds."""

    def __init__(self, bench: Bench, ensemble: str, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.place, self.ensemble = ensemble, Ensemble.load(ensemble)
        self.prices = Prices(self.ensemble.denoiser)
        folder.mkdir(parents=True, exist_ok=True)

    def drawn(self, way: Way) -> tuple[NDArray[np.uint8], float]:
        """Return images (scenes, 64, 64, 3), and seconds an image."""
        stem = self.folder / f"{way.name}-{way.label}-{len(self.bench.captions)}".replace(" ", "-")
        images, facts = stem.with_name(f"{stem.name}.npy"), stem.with_name(f"{stem.name}.json")
        if not facts.exists():
            started = time.perf_counter()
            found = self.draw(way)
            seconds = (time.perf_counter() - started) / len(found)
            with images.open("wb") as file:
                np.save(file, found)
            write_atomically(facts, json.dumps({"seconds": seconds}))
        made: NDArray[np.uint8] = np.load(images)
        return made, json.loads(facts.read_text())["seconds"]

    def draw(self, way: Way) -> NDArray[np.uint8]:
        """Draw the scenes in one way."""
        ensemble = self.ensemble if way.store is None and way.scheduler is None else Ensemble.load(self.place)
        denoiser = ensemble.denoiser
        if way.store is not None:
            store_weights(denoiser.experts, way.store)
        if way.scheduler is not None:
            reschedule(ensemble, way.scheduler)
        denoiser.reuse = way.reused
        pipeline = ensemble.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        asked = [Request(caption, seed) for seed, caption in enumerate(self.bench.captions)]
        how, parts = Sampling(steps=way.steps, guidance=way.guidance, guidance_interval=way.guided), []
        with ExitStack() as alone:

            def begin(step: int, steps: int) -> None:
                alone.close()
                if way.is_alone(step):
                    alone.enter_context(only_expert(denoiser, str(way.expert)))

            for start in range(0, len(asked), BATCH):
                begin(0, way.steps)
                parts.append(sample(pipeline, asked[start : start + BATCH], how, begin))
        return np.concatenate(parts)


def compare(draw: Draw, ways: list[Way]) -> tuple[str, str]:
    """Return the table as Markdown, and the page."""
    bench = draw.bench
    score = bench.scores[-1]  # the one that leads the world's protocol
    columns = ["way", "options", "price", "seconds an image", score, "minus the first", "Fréchet"]
    rows, lines = [columns, ["---"] * len(columns)], dict[str, list[FrontierSpot]]()
    base: NDArray[np.float64] | None = None
    for way in ways:
        images, seconds = draw.drawn(way)
        values = bench.scorer.score(images, bench.captions)[score]
        base = values if base is None else base
        quality: Estimate = estimate(values)
        distance = bench.frechet.value(bench.scorer.features(images), bench.reference)
        cost = price(draw.prices, way)
        minus = str(difference(values, base)) if len(rows) > 2 else ""
        rows.append([way.name, way.label, f"{cost:.2f}", f"{seconds:.2f}", str(quality), minus, f"{distance:.1f}"])
        print(" | ".join(rows[-1]), flush=True)
        tip, first = f"{way.name}, {way.label}: {quality} at {cost:.2f}", way.name not in lines
        lines.setdefault(way.name, []).append(FrontierSpot(way.short, quality, cost, tip, own=first))
    groups = {way.name: "expert" if way.expert else "ours" if way.reuse == 1 else "sampling" for way in ways}
    curves = [FrontierLine(name, groups[name], sorted(spots, key=lambda spot: spot.distance)) for name, spots in lines.items()]
    names = (f"operations, one expert in {STEPS} steps = 1; cheaper to the left", score)
    plot = frontier_plot(curves, names, f"{score} against price, {len(bench.captions)} scenes of {bench.world.name}")
    head = f'<meta charset="utf-8"><title>Quality against price</title><style>{style("style.css")}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{plot}</body></html>'
    return "\n".join(f"| {' | '.join(row)} |" for row in rows), page


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python benchmarks/speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--world", choices=list(WORLDS), default="far", help="default: far")
    flags.add_argument("--ensemble", default="demo:ensemble", help="a folder (default: demo:ensemble, of far)")
    flags.add_argument("--way", action="append", required=True, help="a name and options; may be repeated")
    flags.add_argument("--scenes", type=int, default=160, help="scenes that all draw (default: 160)")
    flags.add_argument("--output", type=Path, default=Path("build/speed"))
    given = flags.parse_args()
    folder = given.output / given.world
    bench = Bench(WORLDS[given.world], folder, given.scenes, 0)
    table, page = compare(Draw(bench, given.ensemble, folder / "drawn"), [Way.parse(text) for text in given.way])
    write_atomically(folder / "table.md", table + "\n")
    write_atomically(folder / "page.html", page)
    print(f"\n{table}")


if __name__ == "__main__":
    main()
