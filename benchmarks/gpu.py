"""What ensembles cost on a GPU at real size: steps, an image, training, memory. Some minutes on one GPU; nothing is read or downloaded.

    python benchmarks/gpu.py --output build/gpu                                                       # sd15, sdxl, sd35, flux
    python benchmarks/gpu.py --configs demo:base --device cpu --repeats 1 --output build/rehearsal    # the same program, small

Random weights, made on the device: the cost does not depend on them. All ways of one model are timed in turn in every round, so that a drift of the
machine meets all; ratios are taken within a round, to the experts one after another in the same mode. Given are the median, the smallest and the largest
of n rounds. A row is written as soon as it is known; one that fails (too little memory, no graphs on a CPU) says why, and the rest goes on.
table.md is for docs/performance.md.
"""

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from random_models import RandomModels
from step import step, train_step
from timing import COMPILED, EAGER, GRAPH, Clock, Spread, Work, in_turn, peak_memory, prepared
from torch import Tensor

from afa.aggregators.registry import Recipe
from afa.cli.flags import add_flags, read_flags
from afa.denoiser.reuse import Reuse
from afa.errors import UserError
from afa.experts.quantised import DIFFERENCES, STORES, store_weights
from afa.settings import option

PAPER = Recipe("sabw", {"hidden": 128, "heads": 8, "depth": 2})
TRAINING_BATCH = 8


@dataclass(frozen=True)
class Size:
    """How a model is measured.

    experts: their number
    batch:   of the denoiser; guidance makes 2 of one image
    repeats: rounds
    small:   small enough to be trained, compiled and drawn with in the time there is
    """

    experts: int = 3
    batch: int = 2
    repeats: int = 8
    small: bool = True


SIZES = {
    "sdxl": Size(repeats=4, small=False),
    "sd35": Size(repeats=4, small=False),
    "flux": Size(experts=2, batch=1, repeats=3, small=False),
}  # all others: Size()


@dataclass(frozen=True)
class Options:
    """One measurement, field by field a flag."""

    configs: list[str] = option(
        ["sd15", "sdxl", "sd35", "flux"],
        help="shipped configs, or folders with a model_index.json such as demo:base",
    )
    output: str = option("build/gpu", help="folder of rows.jsonl and table.md")
    device: str = option("cuda", help="where", choices=["cuda", "cpu"])
    repeats: int | None = option(None, least=1, most=1000, help="rounds (default: 8, fewer for large models)")
    side: int | None = option(None, least=1, most=4096, help="of the latents (default: the model's own, else 128)")
    image_steps: int = option(50, least=1, most=1000, help="of an image")
    compile: bool = option(False, help="also compile small models, which takes a minute or two")

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no GPU here; --device cpu rehearses the program")


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, or why it was not.

    over_experts: ratio to the experts one after another
    memory_gb:    peak
    """

    model: str
    what: str
    mode: str
    seconds: Spread | None = None
    over_experts: Spread | None = None
    memory_gb: float | None = None
    error: str = ""

    def cells(self) -> list[str]:
        """Return the line's cells."""
        took = self.error if self.seconds is None else _shown(self.seconds, 1000, 1)
        over = "" if self.over_experts is None else _shown(self.over_experts, 1, 2)
        return [self.model, self.what, self.mode, took, over, "" if self.memory_gb is None else f"{self.memory_gb:.1f}"]


def _shown(spread: Spread, factor: int, digits: int) -> str:
    middle, low, high = (f"{factor * value:.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{middle} [{low}, {high}], n = {spread.n}"


HEAD = ["model", "what", "mode", "ms", "over the experts in turn", "peak GB"]


class Record:
    """The rows so far; each is on disk as soon as it is added."""

    def __init__(self, folder: Path, heading: str) -> None:
        self.folder, self.heading = folder, heading
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        """Write a row and print it."""
        self.rows.append(row)
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        (self.folder / "table.md").write_text(f"{self.heading}\n\n{table}\n")
        print(" | ".join(filter(None, row.cells())), flush=True)

    @contextmanager
    def noted(self, model: str, what: str, mode: str) -> Iterator[None]:
        """Turn an error into a row that names it."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            yield
        except Exception as error:  # whatever it is, the other rows are worth having
            why = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            self.add(Row(model, what, mode, error=why[:160].replace("|", "/")))


class Bench:
    """Measures one model and adds its rows to the record."""

    def __init__(self, record: Record, config: str, options: Options) -> None:
        self.record, self.config, self.options = record, config, options
        self.size = SIZES.get(config, Size())
        self.repeats = options.repeats or self.size.repeats
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.clock = Clock(options.device)
        self.models = RandomModels(config, self.size.experts, options.device, self.dtype, side=options.side)
        self.experts, self.fused = self.models.experts, self.models.fused
        self.call = self.models.call(self.size.batch)
        self.is_unet = "sample" in self.call  # else latents are no maps, or the scheduler is another
        self.default = self.models.by_size()

    def run(self) -> None:
        """Measure everything."""
        for mode in (EAGER, GRAPH, *([COMPILED] if self.options.compile and self.size.small else [])):
            self.steps(mode)
        if self.size.small and self.is_unet:
            self.training()
            with self.record.noted(self.config, f"image of {self.options.image_steps} steps", EAGER):
                self.image()
        self.stores()

    def steps(self, mode: str) -> None:
        """Time a denoising step: one expert, all of them in turn, the ensembles."""
        alone = [step(expert, self.call) for expert in self.experts]
        ways: dict[str, Callable[[], Work]] = {
            "one expert": lambda: alone[0],
            f"{len(alone)} experts in turn": lambda: in_turn(alone),
            "mean": lambda: step(self.fused(Recipe("mean")), self.call),
            "default": lambda: step(self.fused(self.default), self.call),
            "default, weights of aggregators in float32": lambda: step(self.fused(self.default, dtype=torch.float32), self.call),
            "default, blocks": lambda: step(self.fused(self.default, "blocks"), self.call),
            "sabw as large": lambda: step(self.fused(self.models.by_size("sabw")), self.call),
        }
        if self.size.small:
            ways["paper"] = lambda: step(self.fused(PAPER), self.call)
        if self.is_unet:
            ways["one expert, channels last"] = self.channels_last
        self.time_in_turn(ways, f"{len(alone)} experts in turn", mode)

    def channels_last(self) -> Work:
        """Return a step of one expert whose weights and latents lie in channels last."""
        inside = self.call["sample"].contiguous(memory_format=torch.channels_last)
        return step(self.models.made().to(memory_format=torch.channels_last), {**self.call, "sample": inside})

    def time_in_turn(self, ways: Mapping[str, Callable[[], Work]], whole: str, mode: str) -> None:
        """Time works round by round. whole: the one that the others are compared with"""
        works: dict[str, Work] = {}
        for name, make in ways.items():
            with self.record.noted(self.config, name, mode):
                work = prepared(make(), mode)
                work()
                works[name] = work
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.repeats):
            for name, work in works.items():
                taken[name].append(self.clock.time(work)[0])
        for name, seconds in taken.items():
            ratios = [mine / all_ for mine, all_ in zip(seconds, taken.get(whole, []), strict=False)]
            self.record.add(Row(self.config, name, mode, Spread.of(seconds), Spread.of(ratios) if ratios else None))

    def training(self) -> None:
        """Time a training step; the ratio is to the experts' own passes to their latents."""
        call = self.models.call(TRAINING_BATCH)
        for name, recipe in (("default", self.default), ("paper", PAPER)):
            for again in ("", ", large maps", ", checkpointing"):
                what = f"training step of {TRAINING_BATCH}, {name}{again}"
                with self.record.noted(self.config, what, EAGER):
                    ensemble = self.fused(recipe, dtype=torch.float32).train()
                    work = train_step(ensemble, call, list(ensemble.aggregators.parameters()), bool(again), "large" in again)
                    own = in_turn([train_step(expert, call, (), False) for expert in self.experts])
                    own()
                    peak = self.peak(work)
                    pairs = [(self.clock.time(work)[0], self.clock.time(own)[0]) for _ in range(self.repeats)]
                    ratio = Spread.of([mine / theirs for mine, theirs in pairs])
                    self.record.add(Row(self.config, what, EAGER, Spread.of([mine for mine, _ in pairs]), ratio, peak))

    def image(self) -> None:
        """Time a whole image with guidance: steps of the default ensemble, scheduler and VAE; eager, as a graph, and with steps reused."""
        vae, scheduler = self.models.made("vae"), DDIMScheduler()
        scheduler.set_timesteps(self.options.image_steps)
        output: list[Tensor] = []

        @torch.no_grad()
        def predict() -> None:
            output[:] = [denoiser(**self.call).sample]

        denoiser = self.fused(self.default)
        lead = Reuse(8, lead=denoiser.names[0])
        for words, mode, reuse in (("", EAGER, None), ("", GRAPH, None), (", reuse 3", EAGER, Reuse(3)), (", reuse 8, one leads", EAGER, lead)):
            what = f"image of {self.options.image_steps} steps{words}"
            with self.record.noted(self.config, what, mode):
                denoiser.reuse = reuse
                work = prepared(predict, mode)

                @torch.no_grad()
                def draw(work: Work = work) -> None:
                    noisy = torch.randn_like(self.call["sample"][:1])
                    for timestep in scheduler.timesteps:
                        self.call["sample"].copy_(noisy)
                        self.call["timestep"].fill_(timestep)
                        work()
                        without, with_prompt = output[0].chunk(2)
                        noisy = scheduler.step(without + 5 * (with_prompt - without), timestep, noisy).prev_sample
                    vae.decode(noisy)

                draw()
                seconds = [self.clock.time(draw)[0] for _ in range(min(self.repeats, 3))]
                self.record.add(Row(self.config, what, mode, Spread.of(seconds), None, self.peak(draw)))

    def stores(self) -> None:
        """Time steps of the default ensemble with its experts as they are, in 8 bits, and streamed; and their peaks."""
        for store in (None, *STORES):
            what = f"default, experts {store or 'resident'}"
            with self.record.noted(self.config, what, EAGER):
                if store is not None:
                    self.experts.clear()  # of one kind at a time: two would not fit
                    for _ in range(self.size.experts):
                        self.experts.append(self.models.made())
                        if store not in DIFFERENCES:
                            store_weights(self.experts[-1], store)
                if store in DIFFERENCES:
                    store_weights(torch.nn.ModuleList(self.experts), store)
                work = step(self.fused(self.default), self.call)
                peak = self.peak(work)
                seconds = [self.clock.time(work)[0] for _ in range(min(self.repeats, 3))]
                self.record.add(Row(self.config, what, EAGER, Spread.of(seconds), None, peak))

    def peak(self, work: Work) -> float:
        """Return the peak of memory during some work, in GB."""
        if self.options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        work()
        return peak_memory(self.options.device)


def main() -> int:
    """Run. Returns 0 done, 2 not as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Options)
    try:
        options = read_flags(Options, parser.parse_args())
        device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"
        record = Record(Path(options.output), f"{device}, torch {torch.__version__}, random weights")
        for config in options.configs:
            with record.noted(config, "the model", ""):
                Bench(record, config, options).run()
    except UserError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
