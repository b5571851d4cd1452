"""Hooks of a denoiser, as contexts: record, adjust or scale weights, hide tokens, run one expert alone."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afa.denoiser.forward import Adjuster, Observer
from afa.denoiser.schedule import share_of_steps
from afa.denoiser.strengths import (
    FAINTEST,
    Active,
    Strength,
    changes,
    check_regions,
    factor_maps,
    rescaled,
)
from afa.errors import UserError, unknown
from afa.settings import WEIGHT, check_number

if TYPE_CHECKING:
    from afa.denoiser.base import EnsembleDenoiser


@dataclass
class WeightMaps:
    """The weight maps of all passes inside `record_weights`: per-pixel weights of the experts.

    experts:   names, in the order of the maps' second axis
    timesteps: one per pass
    maps:      one dict per pass: stage name -> (B, N, H, W) float32 on the CPU, sum 1 over N. Guidance
               doubles B
    prompt_first: of both halves, the first one is that with the prompt; else the second one
    """

    experts: tuple[str, ...]
    timesteps: list[float] = field(default_factory=list)
    maps: list[dict[str, Tensor]] = field(default_factory=list)
    prompt_first: bool = False

    def stage(self, name: str) -> Tensor:
        """Return the maps of one stage over all passes: (passes, B, N, H, W)."""
        return torch.stack([maps[name] for maps in self.maps])

    def begin(self, timestep: Tensor | float | int) -> None:
        """Open the entry of the next pass."""
        self.timesteps.append(float(torch.as_tensor(timestep).flatten()[0]))
        self.maps.append({})

    def observe(self, stage: str, weights: Tensor) -> None:
        """Keep one map of the open pass."""
        self.maps[-1][stage] = weights.detach().float().cpu()


@contextmanager
def record_weights(denoiser: "EnsembleDenoiser") -> Iterator[WeightMaps]:
    """Record all weight maps: `with record_weights(ensemble.denoiser) as maps: pipe(...)`.

    denoiser: ensemble.denoiser
    Yields WeightMaps, to which each pass is added. Raises RuntimeError if another record_weights is open, and
    if steps are reused, since those in between have no weights.
    """
    if getattr(denoiser, "reuse", None) is not None:  # what combines experts while sampling reuses nothing
        raise RuntimeError(
            "steps that are reused have no weights of all stages; set denoiser.reuse = None first"
        )
    if denoiser._maps is not None:
        raise RuntimeError(
            "weights of this denoiser are being recorded already; close the outer record_weights first"
        )
    maps = denoiser._maps = WeightMaps(denoiser.names, prompt_first=denoiser.interface.prompt_first)
    try:
        yield maps
    finally:
        denoiser._maps = None


@contextmanager
def watch_weights(denoiser: "EnsembleDenoiser", observer: Observer) -> Iterator[None]:
    """Call an observer with the name and weights (B, N, H, W) of every fused stage, with gradients.

    It is for losses on weights; to keep maps, use record_weights.
    Raises RuntimeError if another watch_weights is open.
    """
    if denoiser._watch is not None:
        raise RuntimeError("weights of this denoiser are being watched already")
    denoiser._watch = observer
    try:
        yield
    finally:
        denoiser._watch = None


@contextmanager
def adjust_weights(denoiser: "EnsembleDenoiser", adjuster: Adjuster) -> Iterator[None]:
    """Inside the context, every fused stage uses the weights that `adjuster(stage, weights)` returns.

    denoiser: ensemble.denoiser
    adjuster: (stage name, weights) -> weights of the same shape (R, N, H, W), which sum to 1 over N. R is the
              batch B; where each expert has its own blend (stitch), it is B * N, a sample's N rows together
    record_weights records the adjusted weights. Raises RuntimeError if another adjust_weights is open.
    """
    if denoiser._adjust is not None:
        raise RuntimeError("weights of this denoiser are being adjusted already")
    denoiser._adjust = adjuster
    try:
        yield
    finally:
        denoiser._adjust = None


@contextmanager
def scale_weights(
    denoiser: "EnsembleDenoiser",
    strengths: Mapping[str, float],
    regions: Sequence[Strength] = (),
    scheduler: Any = None,
) -> Iterator[None]:
    """Multiply experts' weights: `with scale_weights(ensemble.denoiser, {"curves": 0}): pipe(...)`.

    denoiser:  ensemble.denoiser
    strengths: expert's name -> factor, at least 0 (the expert is off); 1 for missing names. Weights are
               divided by their sum afterwards. The mapping is read at every stage, so it may change
    regions:   more factors, in a part of the picture or of the steps, with masks of one picture (1, H, W)
    scheduler: the pipeline's, needed for parts of the steps: its `timesteps` say which step runs
    Raises ValueError for an unknown name, a negative or infinite factor, and if all experts are off.
    """
    check_strengths(denoiser.names, strengths)
    check_regions(denoiser.names, regions)
    for one in regions:
        if one.mask is not None and len(one.mask) != 1:
            raise UserError(
                f"the mask of expert '{one.expert}' is for {len(one.mask)} pictures; give one for all of them"
            )
        if scheduler is None and (one.start, one.end) != (0, 1):
            raise UserError(
                f"the strength of expert '{one.expert}' holds from {one.start:g} to {one.end:g} of the "
                "steps; give the pipeline's scheduler, which says which step runs"
            )
    active: Active = tuple(regions)  # in the step that runs
    kept: dict[tuple[Active, tuple[int, int]], Tensor] = {}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal active
        interface = denoiser.interface
        given = args[1] if len(args) > 1 else kwargs[interface.timestep_input]
        share = share_of_steps(scheduler, interface.timestep_from_model(given))
        active = tuple(one for one in regions if one.holds(share))

    def scaled(stage: str, weights: Tensor) -> Tensor:
        values = [strengths.get(name, 1.0) for name in denoiser.names]
        if len(set(values)) == 1 and not changes(active):
            return weights
        factors = weights.new_tensor(values).view(1, -1, 1, 1)
        if changes(active):
            size = (weights.shape[-2], weights.shape[-1])
            if (active, size) not in kept:
                kept[active, size] = factor_maps(active, denoiser.names, size).to(weights)
            factors = factors * kept[active, size]
            if not factors.any(1).all():
                raise UserError(
                    "all experts are off at a place of the picture; give at least one a strength above 0"
                )
        return rescaled(weights, factors)

    with ExitStack() as stack:
        stack.enter_context(adjust_weights(denoiser, scaled))
        if scheduler is not None and regions:
            stack.callback(denoiser.register_forward_pre_hook(begin, with_kwargs=True).remove)
        yield


@contextmanager
def hide_tokens(denoiser: "EnsembleDenoiser", tokens: Collection[int]) -> Iterator[None]:
    """Inside the context, aggregators do not attend to some tokens of the prompt; experts read all of it.

    denoiser: ensemble.denoiser
    tokens:   positions of the tokens in the prompt embeddings, from 0
    It shows how the weights depend on a word, but not completely, since text encoders mix tokens.
    Raises ValueError if no token is left.
    """

    def hidden(aggregator: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features, temb, text, text_mask, *rest = args  # as run_stages calls it
        everything = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        visible = everything if text_mask is None else text_mask.bool().clone()
        visible[:, list(tokens)] = False
        if not visible.any(1).all():
            raise ValueError(
                f"all {visible.shape[1]} tokens are hidden; leave aggregators at least one to look at"
            )
        return features, temb, text, visible, *rest

    with ExitStack() as stack:
        for aggregator in denoiser.aggregators.values():
            stack.callback(aggregator.register_forward_pre_hook(hidden).remove)
        yield


def check_strengths(names: tuple[str, ...], strengths: Mapping[str, float]) -> None:
    """Raise ValueError for strengths that scale_weights cannot use."""
    for name, strength in strengths.items():
        if name not in names:
            raise ValueError(unknown(name, names, "expert"))
        check_number(strength, f"the strength of expert '{name}' is", **WEIGHT)
        if 0 < strength < FAINTEST:
            raise UserError(
                f"the strength of expert '{name}' is {strength:g}, too small for float32; "
                f"the least above 0 is {FAINTEST:g}"
            )
    if all(strengths.get(name) == 0 for name in names):
        raise ValueError(
            f"all experts ({', '.join(names)}) are turned off; give at least one a strength above 0"
        )


@contextmanager
def only_expert(denoiser: "EnsembleDenoiser", name: str) -> Iterator[None]:
    """Inside the context, the denoiser is one expert alone, with the ensemble's VAE and scheduler.

    denoiser: ensemble.denoiser
    name:     of the expert
    It shows what the shared parts alone change. Raises ValueError for an unknown name.
    """
    if name not in denoiser.names:
        raise ValueError(unknown(name, denoiser.names, "expert"))
    before, denoiser._solo_expert = denoiser._solo_expert, denoiser.names.index(name)
    try:
        yield
    finally:
        denoiser._solo_expert = before
