"""What is switched on for a while: recording, watching and adjusting weights, words hidden, one expert alone."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afa.denoiser.walk import Adjuster, Observer
from afa.errors import UserError
from afa.lookup import unknown
from afa.options import WEIGHT, check_number

if TYPE_CHECKING:
    from afa.denoiser.base import EnsembleDenoiser

FAINTEST = 1e-6  # strength of an expert that is not off


@dataclass
class WeightMaps:
    """The weight maps of the passes made while `record_weights` was open, one entry a pass.

    timesteps: of each pass. maps: of each pass, by stage name, (B, N, H, W) float32 on the CPU; B is doubled by
    guidance, the unconditional half first.
    """

    experts: tuple[str, ...]
    timesteps: list[float] = field(default_factory=list)
    maps: list[dict[str, Tensor]] = field(default_factory=list)

    def stage(self, name: str) -> Tensor:
        """The maps of one stage over all passes: (passes, B, N, H, W)."""
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
    """Keep every weight map of the passes made inside: `with record_weights(ensemble.denoiser) as maps: pipe(...)`."""
    if denoiser._maps is not None:
        raise RuntimeError("weights of this denoiser are being recorded already; close the outer record_weights first")
    maps = denoiser._maps = WeightMaps(denoiser.names)
    try:
        yield maps
    finally:
        denoiser._maps = None


@contextmanager
def watch_weights(denoiser: "EnsembleDenoiser", observer: Observer) -> Iterator[None]:
    """Inside, every fused stage's name and weights (B, N, H, W) are shown to the observer as they are, gradients and all.

    For losses on weights; whoever wants to keep maps takes record_weights.
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
    """Inside, every fused stage uses what `adjuster(stage, weights)` answers instead of the weights it is shown.

    weights (R, N, H, W), convex over N, to be answered in the same shape. R is the batch, or batch times N, a sample's N rows one
    after another, where an aggregator hands every expert a blend of its own. Adjusted weights are what is recorded.
    """
    if denoiser._adjust is not None:
        raise RuntimeError("weights of this denoiser are being adjusted already")
    denoiser._adjust = adjuster
    try:
        yield
    finally:
        denoiser._adjust = None


@contextmanager
def scale_weights(denoiser: "EnsembleDenoiser", strengths: Mapping[str, float]) -> Iterator[None]:
    """Inside, experts weigh more or less than their aggregators say: `with scale_weights(denoiser, {"curves": 0}): pipe(...)`.

    strengths: factors by name, 1 for those left out, 0 turns an expert off; weights are brought back to sum 1 at every place.
    The mapping is read at every stage, so a caller may change it meanwhile. Raises ValueError for a name that is no expert's, for
    factors that are negative or not finite, and if all experts would be off.
    """
    check_strengths(denoiser.names, strengths)

    def scaled(stage: str, weights: Tensor) -> Tensor:
        values = [strengths.get(name, 1.0) for name in denoiser.names]
        if len(set(values)) == 1:
            return weights  # a softmax sums to one only up to rounding: equal factors change no bit
        factors = weights.new_tensor(values).view(1, -1, 1, 1)
        changed = weights * factors
        total = changed.sum(1, keepdim=True)
        # where only experts that are off weigh anything, the others share alike
        return torch.where(total > 0, changed / total.clamp_min(torch.finfo(total.dtype).tiny), factors / factors.sum())

    with adjust_weights(denoiser, scaled):
        yield


@contextmanager
def hide_tokens(denoiser: "EnsembleDenoiser", tokens: Collection[int]) -> Iterator[None]:
    """Inside, aggregators cannot look at some of the text's tokens, by their place; the experts read the whole prompt as ever.

    What the weights owe to a word: hide its tokens and see what changes. Encoders have let every token hear of its neighbours, so what
    a word says is not wholly hidden with it. Raises ValueError if no token would be left.
    """

    def hidden(aggregator: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features, temb, text, kept, *rest = args  # as walk calls it
        seen = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if kept is None else kept.bool().clone()
        seen[:, list(tokens)] = False
        if not seen.any(1).all():
            raise ValueError(f"all {seen.shape[1]} tokens are hidden; leave aggregators at least one to look at")
        return features, temb, text, seen, *rest

    with ExitStack() as stack:
        for aggregator in denoiser.aggregators.values():
            stack.callback(aggregator.register_forward_pre_hook(hidden).remove)
        yield


def check_strengths(names: tuple[str, ...], strengths: Mapping[str, float]) -> None:
    """Raises ValueError for strengths that scale_weights cannot use."""
    for name, strength in strengths.items():
        if name not in names:
            raise ValueError(unknown(name, names, "expert"))
        check_number(strength, f"the strength of expert '{name}' is", **WEIGHT)
        if 0 < strength < FAINTEST:
            raise UserError(f"the strength of expert '{name}' is {strength:g}, too small for float32; the least above 0 is {FAINTEST:g}")
    if all(strengths.get(name) == 0 for name in names):
        raise ValueError(f"all experts ({', '.join(names)}) are turned off; give at least one a strength above 0")


@contextmanager
def only_expert(denoiser: "EnsembleDenoiser", name: str) -> Iterator[None]:
    """Inside, the denoiser is one expert alone, in the ensemble's frame (its text encoders, VAE and scheduler).

    The control for what the frame does without routing. Raises ValueError for a name that is no expert's.
    """
    if name not in denoiser.names:
        raise ValueError(unknown(name, denoiser.names, "expert"))
    before, denoiser._only = denoiser._only, denoiser.names.index(name)
    try:
        yield
    finally:
        denoiser._only = before
