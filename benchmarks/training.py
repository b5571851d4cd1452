"""What training costs: time over the experts' own passes, memory by what is switched on, and what a cache saves.

    python benchmarks/training.py                                     # the embedded experts, everything measured
    python benchmarks/training.py --config sd15 --batch 8 --plan      # memory of every way, counted without memory (minutes)
    python benchmarks/training.py --config sd15 --aggregator sabw --hidden 128 --heads 8 --depth 2 --attention-up-to 65536 --plan   # the paper's

A training step is compared with what no method can avoid: each expert's forward pass and the backward pass to its activations, one
expert after another. Ratios are taken within a round; given are the median, the smallest and the largest of n rounds. Memory is counted
from the tensors of a step: what an allocator adds is not in it. `--device cuda` measures the allocator's peak as well.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import step as steps
import torch
from timing import Clock, Spread, Work, rounds

from afa.aggregators.registry import Recipe
from afa.aggregators.settings import ATTENTION_HELP, AggregatorSettings, with_aggregator_options
from afa.cli.flags import add_flags, read_flags
from afa.demo.data import EXPERTS
from afa.distillation.plan import distill_bytes
from afa.errors import UserError
from afa.experts.quantised import store_weights
from afa.settings import COUNT, option
from afa.training.plan import step_bytes
from afa.training.run import plan
from afa.training.settings import TrainSettings

LARGE = "large"
# name -> experts in, whether stages are recomputed (or those on the largest maps), experts' weights in
WAYS: dict[str, tuple[str, bool | str, str | None]] = {
    "float32": ("float32", False, None),
    "float32, large maps": ("float32", LARGE, None),
    "float32, checkpointing": ("float32", True, None),
    "bfloat16": ("bfloat16", False, None),
    "bfloat16, large maps": ("bfloat16", LARGE, None),
    "bfloat16, checkpointing": ("bfloat16", True, None),
    "bfloat16, checkpointing, int8": ("bfloat16", True, "int8"),
    "bfloat16, checkpointing, cpu": ("bfloat16", True, "cpu"),
}
MEASURED = ("float32", "float32, large maps", "float32, checkpointing")  # in time: what a CPU is good at


@with_aggregator_options
@dataclass(frozen=True, kw_only=True)
class Options(AggregatorSettings):
    """One measurement, field by field a flag."""

    config: str = option("demo:base", help="a shipped config (sd15, sdxl, sd35 …), or a folder with a model_index.json")
    experts: int = option(3, **COUNT, help="how many experts")
    size: int | None = option(
        None, help="side of the image in pixels, eight for one of the latent's (default: the model's own)"
    )
    batch: int = option(8, **COUNT, help="images a step")
    aggregator: str | None = option(None, help="kind of aggregator (default: that of `afa train`)")
    attention_up_to: int | None = option(None, least=0, most=2**16, help=ATTENTION_HELP)
    repeats: int = option(3, **COUNT, help="rounds")
    plan: bool = option(False, help="only count memory; nothing is run")
    distill: bool = option(False, help="with --plan: the memory of a distillation, --batch latents a step")
    images: int = option(256, **COUNT, help="for the cache, of the embedded world")
    device: str = option("cpu", help="where", choices=["cpu", "cuda"])
    json: bool = option(False, help="print JSON")

    def steps(self, dtype: str = "float32") -> steps.Options:
        """The same for the benchmark of steps."""
        shared = {name: value for name, value in asdict(self).items() if name not in ("plan", "distill", "images", "json")}
        return steps.Options(**shared, dtype=dtype)


def memory(options: Options) -> dict[str, float]:
    """GB of tensors in a step, by way."""
    asked = options.steps()
    models = asked.models("meta")
    model = asked.ensemble(models)
    found = {}
    for name, (dtype, checkpointing, store) in WAYS.items():
        print(f"counting memory: {name}", file=sys.stderr, flush=True)
        kind, large = getattr(torch, dtype), checkpointing == LARGE
        found[name] = step_bytes(model, options.batch, models.side, kind, bool(checkpointing), store, largest_maps_only=large) / 1e9
    return found


STUDENTS: dict[str, tuple[int | None, str, bool, str | None]] = {  # rank of a LoRA, computing in, stages recomputed, teacher's weights in
    "whole, float32": (None, "float32", False, None),
    "whole, bfloat16": (None, "bfloat16", False, None),
    "whole, bfloat16, checkpointing": (None, "bfloat16", True, None),
    "whole, bfloat16, checkpointing, int8": (None, "bfloat16", True, "int8"),
    "LoRA of rank 32, bfloat16": (32, "bfloat16", False, None),
    "LoRA of rank 32, bfloat16, checkpointing, int8": (32, "bfloat16", True, "int8"),
}


def distilling(options: Options) -> dict[str, float]:
    """GB of tensors in a step of a distillation, by way."""
    asked = options.steps()
    models = asked.models("meta")
    teacher, found = asked.ensemble(models), {}
    student = type(teacher)(models.experts[:1], recipe=Recipe("mean"), placement="out")
    for name, (rank, dtype, checkpointing, store) in STUDENTS.items():
        print(f"counting memory: {name}", file=sys.stderr, flush=True)
        recompute = type(student).enable_gradient_checkpointing if checkpointing else lambda denoiser: None
        size, kind = options.batch, getattr(torch, dtype)
        found[name] = distill_bytes(teacher, student, size, models.side, kind, rank, store, recompute) / 1e9
    return found


def times(options: Options) -> dict[str, Any]:
    """Seconds of a step and their ratio to the experts', by way."""
    found: dict[str, Any] = {}
    for name in MEASURED if options.device == "cpu" else WAYS:
        dtype, checkpointing, store = WAYS[name]
        torch.manual_seed(0)
        asked = options.steps(dtype)
        models = asked.models()
        call = models.call(asked.batch)
        alone: list[Work] = [steps.train_step(expert, call, (), False) for expert in models.experts]
        if store:
            models.experts = [copy.deepcopy(expert) for expert in models.experts]
            for expert in models.experts:
                store_weights(expert, store)
        model = asked.ensemble(models, torch.float32).train()
        own = steps.train_step(model, call, list(model.aggregators.parameters()), bool(checkpointing), checkpointing == LARGE)
        found[name] = rounds(name, Clock(options.device), alone, own, options.repeats)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            own()
            found[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def caching(options: Options) -> dict[str, Any]:
    """Seconds until the first step: without a cache, filling it, and from a full one; on the embedded experts."""
    from afa.training.run import _initialise
    from afa.training.setup import make_accelerator, make_trainer

    found: dict[str, list[float]] = {"without": [], "filling": [], "from_the_cache": []}
    for number in range(options.repeats):
        with tempfile.TemporaryDirectory() as place, _quiet():
            for name, cache in (
                ("without", None),
                ("filling", f"{place}/cache"),
                ("from_the_cache", f"{place}/cache"),
            ):
                settings = TrainSettings(
                    experts=[str(path) for path in EXPERTS.values()], data=f"scenes:{options.images}", output=f"{place}/{number}-{name}",
                    aggregator="sabw", hidden=32, heads=4, depth=1, cache=cache, device=options.device,
                )  # fmt: skip
                planned, accelerator = plan(settings), make_accelerator(settings)
                started = time.monotonic()
                make_trainer(planned, accelerator, _initialise)
                found[name].append(time.monotonic() - started)
    ratio = [cached / plain for cached, plain in zip(found["from_the_cache"], found["without"], strict=True)]
    return {
        **{f"{name}_seconds": Spread.of(values) for name, values in found.items()},
        "cached_over_without": Spread.of(ratio),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    from afa.cli.main import hush

    hush()
    yield


def measure(options: Options) -> dict[str, Any]:
    """Everything asked for."""
    found: dict[str, Any] = {
        "setting": {**asdict(options), "torch": torch.__version__, "threads": torch.get_num_threads()}
    }
    found["memory_gb"] = distilling(options) if options.distill else memory(options)
    if not options.plan:
        found |= {f"step, {name}": values for name, values in times(options).items()}
        found["until the first step"] = caching(options)
    return found


def as_text(found: dict[str, Any]) -> str:
    """The result as lines."""
    lines = [", ".join(f"{name} {value}" for name, value in found["setting"].items())]
    for part, values in list(found.items())[1:]:
        for name, value in values.items():
            lines.append(
                f"{part:<28} {name.replace('_', ' '):<30} {value if isinstance(value, Spread) else f'{value:9.3f}'}"
            )
    return "\n".join(lines)


def main() -> int:
    """-> 0 done, 2 not as asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Options)
    try:
        options = read_flags(Options, parser.parse_args())
        found = measure(options)
    except (UserError, ValueError) as error:
        print(f"training.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, default=asdict) if options.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
