"""What is switched on for a while: recording and watching weights, one expert alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afa.denoiser.walk import Observer
from afa.lookup import unknown

if TYPE_CHECKING:
    from afa.denoiser.base import EnsembleDenoiser


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
