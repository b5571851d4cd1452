"""What an ensemble costs over its experts: time of a denoising step, part by part, and of a training step; memory.

    python benchmarks/step.py --config sd15 --size 512 --batch 2
    python benchmarks/step.py --config sd15 --aggregator sabw --hidden 128 --heads 8 --depth 2 --attention-up-to 65536      # the paper's
    python benchmarks/step.py --config demo:base --repeats 5 --compile

Random weights: the cost does not depend on them. Aggregators are those that `afa train` makes, unless flags say otherwise. Every round runs the
experts one after another and then the ensemble, so that a drift of the machine meets both; ratios are taken within a round. Given are the median,
the smallest and the largest of n rounds. Parts are measured by the clock around them, eager only.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from random_models import RandomModels
from timing import Clock, Spread, Work, in_turn, peak_memory, prepared, rounds
from torch import Tensor, nn

from afa.aggregators import base, sabw, stitch
from afa.aggregators.registry import count_parameters
from afa.aggregators.settings import ATTENTION_HELP, AggregatorSettings, with_aggregator_options
from afa.cli.flags import add_flags, read_flags
from afa.denoiser.base import EnsembleDenoiser
from afa.errors import UserError
from afa.experts.quantised import store_weights
from afa.settings import COUNT, STORES, option

SMALL = 50_000_000  # parameters an expert up to which a training step is always measured
PIXELS = 8  # a side, for one of the latent's


@with_aggregator_options
@dataclass(frozen=True, kw_only=True)
class Options(AggregatorSettings):
    """One measurement, field by field a flag."""

    config: str = option("sd15", help="a shipped config (sd15, sdxl, sd35 …), or a folder with a model_index.json, such as demo:base")
    experts: int = option(3, **COUNT, help="how many experts")
    shared_weights: bool = option(False, help="all experts have the same weights in memory: the same work, for models that do not fit N times")
    size: int | None = option(None, least=PIXELS, most=2**14, help="side of the image in pixels, eight for one of the latent's (default: the model's own)")
    batch: int = option(2, **COUNT, help="of the denoiser; guidance makes 2 of one image")
    dtype: str = option("float32", help="of the experts and of what aggregators compute", choices=["float32", "bfloat16", "float16"])
    aggregator: str | None = option(None, help="kind of aggregator (default: that of `afa train`)")
    placement: str | None = option(None, help="fused stages: layers, blocks, out, or names such as M00,OUT11 (default: the family's)")
    attention_up_to: int | None = option(None, least=0, most=2**16, help=ATTENTION_HELP)
    repeats: int = option(3, **COUNT, help="rounds")
    graph: bool = option(False, help="experts and ensemble as CUDA graphs")
    compile: bool = option(False, help="experts and ensemble by torch.compile")
    train: bool = option(False, help="measure a training step too, as is always done for small models")
    gradient_checkpointing: bool = option(False, help="in the training step, of experts and ensemble alike")
    store: str | None = option(None, help="how the ensemble's experts are stored, as in afa generate; the experts in turn stay as they are", choices=STORES)
    channels_last: bool = option(False, help="weights and latents of U-Nets in channels last")
    device: str = option("cpu", help="where", choices=["cpu", "cuda"])
    json: bool = option(False, help="print JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size % PIXELS:
            raise UserError(f"--size {self.size} must be a multiple of {PIXELS} pixels")
        if self.graph and self.compile:
            raise UserError("--graph and --compile are two ways; give one")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda is not available here; use --device cpu")

    @property
    def mode(self) -> str:
        """How works are run."""
        return "graph" if self.graph else "compiled" if self.compile else "eager"

    def models(self, device: str | None = None) -> RandomModels:
        """Return the experts. Raises UserError if there is no such config."""
        side = None if self.size is None else self.size // PIXELS
        kind = getattr(torch, self.dtype)
        return RandomModels(self.config, self.experts, device or self.device, kind, shared=self.shared_weights, side=side)

    def ensemble(self, models: RandomModels, dtype: torch.dtype | None = None) -> EnsembleDenoiser:
        """Return the ensemble of the models. dtype: of the aggregators' weights; None: the experts'"""
        return models.fused(models.by_size(self.aggregator, self.aggregator_options(), self.attention_up_to), self.placement, dtype)


def step(denoiser: nn.Module, call: dict[str, Any]) -> Work:
    """A denoising step."""
    return torch.no_grad()(lambda: denoiser(**call))


def train_step(denoiser: Any, call: dict[str, Any], trained: Sequence[Tensor], checkpointing: bool, largest_maps_only: bool = False) -> Work:
    """Forward and backward. An expert alone has nothing to train: its gradients run through all features to the latents."""
    latents_name = "sample" if "sample" in call else "hidden_states"

    def run() -> None:
        latents = call[latents_name].detach().requires_grad_(not trained)
        if checkpointing:
            denoiser.enable_gradient_checkpointing(**({"largest_maps_only": True} if largest_maps_only else {}))
        loss = denoiser(**{**call, latents_name: latents}).sample.float().square().mean()
        torch.autograd.grad(loss, list(trained) or [latents])
        denoiser.disable_gradient_checkpointing()  # an ensemble runs its experts' parts, which must not recompute by themselves

    return run


def measure(options: Options) -> dict[str, Any]:
    """Everything asked for, in one process. The experts' memory is read before there are aggregators."""
    torch.manual_seed(0)
    models = options.models()
    call = models.call(options.batch)
    if options.channels_last:
        for expert in models.experts:
            expert.to(memory_format=torch.channels_last)
        call["sample"] = call["sample"].contiguous(memory_format=torch.channels_last)
    singles = [prepared(step(expert, call), options.mode) for expert in models.experts]
    in_turn(singles)()
    before = peak_memory(options.device)
    if options.store is not None:
        models.experts = [copy.deepcopy(expert) for expert in models.experts]
        store_weights(nn.ModuleList(models.experts), options.store)
    model = options.ensemble(models)
    clock = Clock(options.device)
    if options.mode == "eager":
        watch_parts(clock, model)
    found: dict[str, Any] = {"setting": setting(options, models, model)}
    found["step"] = rounds("step", clock, singles, prepared(step(model, call), options.mode), options.repeats)
    after = peak_memory(options.device)
    found["peak_memory"] = {"experts_gb": before, "ensemble_gb": after, "difference_gb": after - before}
    if options.train or count_parameters(models.experts[0]) < SMALL:
        del model
        found["training_step"] = training(options, models, call)
    return found


def training(options: Options, models: RandomModels, call: dict[str, Any]) -> dict[str, Spread]:
    """A training step, with the aggregators' weights in float32 as in training, over the experts' own passes to their latents."""
    model = options.ensemble(models, torch.float32).train()
    alone = [train_step(expert, call, (), options.gradient_checkpointing) for expert in models.experts]
    own = train_step(model, call, list(model.aggregators.parameters()), options.gradient_checkpointing)
    return rounds("training step", Clock(options.device), alone, own, options.repeats)


def watch_parts(clock: Clock, model: EnsembleDenoiser) -> None:
    """Have a clock time the parts of the aggregators: sub-modules by hooks, functions by a wrapper around them."""
    for aggregator in model.aggregators.values():
        clock.watch("aggregators", aggregator)
        for name in ("res_block", "transformer", "conv_out"):
            part = getattr(aggregator, name, None)
            if part is not None:
                clock.watch(f"aggregators: {name}", part)
    sabw.in_parts = clock.watched("aggregators: conv_in", sabw.in_parts)
    base.blend = stitch.blend = clock.watched("aggregators: blend", base.blend)


def setting(options: Options, models: RandomModels, model: EnsembleDenoiser) -> dict[str, Any]:
    """What was measured, and with what."""
    made = {"aggregator": model.recipe.kind, **model.recipe.options, "attention_up_to": model.recipe.attention_up_to}
    return {
        **{name: value for name, value in asdict(options).items() if value is not None},
        **made,
        "size": models.side * PIXELS,
        "fused_stages": len(model.fused),
        "expert_parameters": count_parameters(models.experts[0]),
        "aggregator_parameters": count_parameters(model.aggregators),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def as_text(found: dict[str, Any]) -> str:
    """The result as lines."""
    lines = [", ".join(f"{name} {value}" for name, value in found["setting"].items())]
    for part, values in list(found.items())[1:]:
        for name, value in values.items():
            shown = value if isinstance(value, Spread) else f"{value:9.3f}"
            lines.append(f"{part.replace('_', ' '):<14} {name:<28} {shown}")
    return "\n".join(lines)


def main() -> int:
    """-> 0 done, 2 not as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Options)
    try:
        options = read_flags(Options, parser.parse_args())
        found = measure(options)
    except (UserError, ValueError) as error:
        print(f"step.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, default=asdict) if options.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
