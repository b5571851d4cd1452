"""What a denoising step costs: operations, counted on the meta device, and time, with random weights."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from afa.aggregators.registry import Recipe
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.lora import shared_copy
from afa.denoiser.reuse import Reuse
from afa.devices import free_bytes
from afa.errors import UserError
from afa.models.registry import FAMILIES, family_of
from afa.settings import Interval
from afa.stages.interface import ModelInterface
from afa.stages.stage import Stage, StageContext

ROUNDS = 3  # of a measurement of time, after one that is not measured


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one pass; a multiplication with an addition counts as two.

    Matrix products, convolutions and attention are counted; norms, activations and sums are not.
    aggregators: by stage name, included in the total.
    """

    total: int
    aggregators: dict[str, int]

    def only(self, stages: Sequence[str]) -> "Flops":
        """Return those of the same ensemble with the aggregators of some stages alone."""
        kept = {stage: self.aggregators[stage] for stage in stages}
        return Flops(self.total - sum(self.aggregators.values()) + sum(kept.values()), kept)


def count_flops(
    denoiser: nn.Module, height: int, width: int, batch: int = 1, tokens: int | None = None
) -> Flops:
    """Count one pass of a denoiser or an ensemble of them on the meta device.

    height, width: of the latents
    batch:         guidance doubles that of the pipeline
    tokens:        of the prompt; None: the family's default
    """
    call = call_of(denoiser, height, width, batch, tokens, device="meta")
    running = _on_meta(denoiser)
    with torch.no_grad(), _counting() as counter, _each_kind_once(running, counter) as repeated:
        running(**call)
    counts = counter.get_flop_counts()
    stages = denoiser.fused if isinstance(denoiser, EnsembleDenoiser) else []
    name = type(denoiser).__name__
    aggregators = {
        stage: sum(counts.get(f"{name}.aggregators.{stage}", {}).values()) + repeated.get(stage, 0)
        for stage in stages
    }
    return Flops(counter.get_total_flops() + sum(repeated.values()), aggregators)


@contextmanager
def _each_kind_once(denoiser: nn.Module, counter: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Within, stages made alike that get alike inputs run once, of all experts, and so do aggregators.

    Yields the operations that the others were spared: of aggregators by stage name, "" of all stages.
    """
    spared = {"": 0}
    if not isinstance(denoiser, EnsembleDenoiser):
        yield spared
        return
    known: dict[Any, tuple[Any, int]] = {}

    def once(run: Callable[..., Any], kind: Any, place: str) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            key = kind, _shapes(inputs)
            if key in known:
                spared[place] = spared.get(place, 0) + known[key][1]
            else:
                earlier = counter.get_total_flops()
                known[key] = run(*inputs), counter.get_total_flops() - earlier
            return known[key][0]

        return counted

    before = denoiser.parallel_stages
    settings = [repr(sorted(model.config.items(), key=str)) for model in denoiser.experts]
    denoiser.parallel_stages = [
        tuple(
            _with_run(stage, once(stage.run, (type(stage), its, *map(_made, stage.modules())), ""))
            for stage, its in zip(same, settings, strict=True)
        )
        for same in before
    ]
    for name, aggregator in denoiser.aggregators.items():
        aggregator.forward = once(aggregator.forward, _made(aggregator), name)
    try:
        yield spared
    finally:
        denoiser.parallel_stages = before
        for aggregator in denoiser.aggregators.values():
            del aggregator.forward


def _made(module: Any) -> Any:
    """What a module is made of: the classes of its parts, and the shapes of its weights."""
    if not isinstance(module, nn.Module):
        return type(module)
    parts = tuple((name, type(part)) for name, part in module.named_modules())
    return parts, tuple((name, weight.shape) for name, weight in module.named_parameters())


def _shapes(value: Any) -> Any:
    """The shapes of the tensors in inputs, a context's among them."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (list, tuple)):
        return tuple(map(_shapes, value))
    if isinstance(value, StageContext):
        return tuple(_shapes(one) for one in vars(value).values())
    return value if isinstance(value, int) else type(value)


def _with_run(stage: Stage, run: Callable[..., Any]) -> Stage:
    changed: Any = copy.copy(stage)
    changed.run = run
    return cast(Stage, changed)


def alike(models: Iterable[Any]) -> bool:
    """Whether all models are of one class and have equal settings, so that they cost the same."""

    def settings(model: Any) -> tuple[type, str]:
        own = sorted((name, value) for name, value in model.config.items() if not name.startswith("_"))
        return type(model), repr(own)

    return len(set(map(settings, models))) == 1


def count_training_flops(
    denoiser: nn.Module, height: int, width: int, batch: int = 1, tokens: int | None = None
) -> int:
    """Count one training step on the meta device: forward, and backward to all that requires a gradient.

    Arguments as in count_flops.
    """
    call = call_of(denoiser, height, width, batch, tokens, device="meta")
    with torch.enable_grad(), _counting() as counter:
        answer = _on_meta(denoiser)(**call).sample
        interface_for(denoiser).to_latents(answer, (height, width)).sum().backward()
    return counter.get_total_flops()


def _on_meta(denoiser: nn.Module) -> nn.Module:
    """Return what runs on the meta device: the denoiser, or an ensemble of it alone (see reads_values)."""
    if isinstance(denoiser, EnsembleDenoiser):
        return denoiser
    family = FAMILIES[family_of(denoiser)]
    if not family.interface.reads_values:
        return denoiser
    trained = [parameter.requires_grad for parameter in denoiser.parameters()]
    alone = family.denoiser([denoiser], recipe=Recipe("mean"), placement="out")
    for parameter, before in zip(denoiser.parameters(), trained, strict=True):
        parameter.requires_grad_(before)  # an ensemble freezes its experts
    return alone


def count_stage_flops(model: Any, height: int, width: int, tokens: int | None = None) -> dict[str, int]:
    """Count the operations of each stage of one expert in one pass: stage name -> operations.

    model:         the expert, on any device; a copy is made from its config on the meta device
    height, width: of the latents
    tokens:        of the prompt; None: the family's default
    """
    with torch.device("meta"):
        meta_model = type(model).from_config(dict(model.config)).eval()
    running = _on_meta(meta_model)
    with torch.no_grad(), _counting() as counter:
        running(**call_of(meta_model, height, width, 1, tokens, device="meta"))
    names = {id(module): f"{type(running).__name__}.{name}" for name, module in running.named_modules()}
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return {
        stage.name: sum(counts.get(names.get(id(module), ""), 0) for module in stage.modules())
        for stage in FAMILIES[family_of(meta_model)].stages(meta_model)
    }


class Prices:
    """What ways to draw an image cost, counted in operations of the denoiser.

    denoiser: of the ensemble; its experts are made anew on the meta device
    side:     of the latents; None: that which the experts are made for
    one, all: operations of a step of one expert, and of the ensemble
    """

    def __init__(self, denoiser: EnsembleDenoiser, side: int | None = None) -> None:
        like: Any = denoiser.experts[0]
        side = side or denoiser.side
        with torch.device("meta"):
            experts = [type(like).from_config(dict(like.config)) for _ in denoiser.names]
        counted = count_flops(type(denoiser)(experts, None, denoiser.recipe, denoiser.placement), side, side)
        by_stage = count_stage_flops(like, side, side)
        self.one, self.all = sum(by_stage.values()), counted.total
        self.stages = [
            len(experts) * by_stage[stage.name] + counted.aggregators.get(stage.name, 0)
            for stage in denoiser.stages
        ]

    def of(self, steps: int, reuse: Reuse | None = None, guidance: Interval = (0.0, 1.0)) -> float:
        """Return the price of an image, relative to one step of one expert.

        steps:    denoising steps
        reuse:    what is reused between them
        guidance: interval of the steps with guidance, see sampling/guidance_interval.py; all others cost half
        """
        guided = [guidance[0] <= step / steps < guidance[1] for step in range(steps)]
        every, count, total = reuse.every if reuse else 1, 0, 0.0
        for step in range(steps):
            if step and guided[step] != guided[step - 1]:
                count = 0  # the batch has another size, so nothing is reused
            if count % every == 0:
                operations = self.all + (self.one if reuse and reuse.lead and every > 1 else 0)
            elif reuse and reuse.lead:
                operations = self.one
            else:
                outer = reuse.outer if reuse else 0
                operations = sum(self.stages[:outer] + self.stages[len(self.stages) - outer :])
            total += operations if guided[step] else operations / 2
            count += 1
        return total / self.one


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a denoising step, measured in turn.

    one_expert: median
    ensemble:   median
    ratios:     ensemble to one expert, (smallest, median, largest) of `rounds` rounds
    """

    one_expert: float
    ensemble: float
    ratios: tuple[float, float, float]
    rounds: int


def time_step(
    denoiser: EnsembleDenoiser,
    height: int,
    width: int,
    batch: int = 1,
    tokens: int | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = ROUNDS,
) -> StepTimes:
    """Measure a step of one expert and of the ensemble on a device, with random weights.

    Time does not depend on weights, so all experts share one set of them in memory.
    Arguments as in count_flops. Raises UserError if one expert does not fit into the device's free memory.
    """
    like: Any = denoiser.experts[0]
    needed, free = sum(p.numel() for p in like.parameters()) * dtype.itemsize, free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"time cannot be measured on {device}: one expert takes {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free; leave out --time"
        )
    with device:
        first = type(like).from_config(dict(like.config)).to(dtype).eval().requires_grad_(False)
    experts = [first, *(shared_copy(first) for _ in denoiser.experts[1:])]
    ensemble = type(denoiser)(experts, denoiser.names, denoiser.recipe, denoiser.placement).eval()
    ensemble.aggregators.to(dtype)
    call = call_of(first, height, width, batch, tokens, device=str(device), dtype=dtype)
    measured = [[_seconds(model, call, device) for model in (first, ensemble)] for _ in range(rounds + 1)][1:]
    ratios = sorted(together / alone for alone, together in measured)
    one, all_ = (statistics.median(seconds) for seconds in zip(*measured, strict=True))
    return StepTimes(one, all_, (ratios[0], statistics.median(ratios), ratios[-1]), rounds)


def _seconds(model: nn.Module, call: dict[str, Any], device: torch.device) -> float:
    def now() -> float:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return time.perf_counter()

    started = now()
    with torch.no_grad():
        model(**call)
    return now() - started


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter, _Shortcuts():
        yield counter


class _Shortcuts(TorchFunctionMode):
    """Count the same in half the time: on the meta device torch decomposes norms and attention in Python."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func in SAME_SHAPE and args and (not torch.is_grad_enabled() or args[0].requires_grad):
            return args[0].clone()
        if (
            func is F.linear
            and len(args) == 3
            and (not torch.is_grad_enabled() or args[0].requires_grad or args[1].requires_grad)
        ):
            return F.linear(*args[:2])
        if func is F.scaled_dot_product_attention and not options.get("enable_gqa"):
            return _attention(*args, **options)
        return func(*args, **options)


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    return query @ key.transpose(-2, -1) @ value


SAME_SHAPE = {F.layer_norm, F.group_norm, F.gelu, F.silu}  # as their input, and nothing that is counted


def interface_for(denoiser: Any) -> ModelInterface:
    """Return how a denoiser or an ensemble is called."""
    family = denoiser.family if isinstance(denoiser, EnsembleDenoiser) else family_of(denoiser)
    return FAMILIES[family].interface


def call_of(
    denoiser: Any,
    height: int,
    width: int,
    batch: int,
    tokens: int | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return the arguments that a pipeline passes to a denoiser or an ensemble, with uninitialised tensors.

    height, width: of the latents
    tokens:        of the prompt; None: the family's default
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    interface = interface_for(denoiser)
    conditions = interface.empty_conditions(
        denoiser.config, batch, tokens or interface.max_sequence_length, empty
    )
    return interface.denoiser_kwargs(
        denoiser.config,
        empty(batch, interface.latent_channels(denoiser.config), height, width),
        empty(batch),
        conditions,
    )
