"""Where experts are never used, what leaving them out there would save, and what it does to the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.training.routing import DROPPED


@dataclass(frozen=True)
class Unused:
    """Where experts stay below `threshold` in every image.

    most (passes, K, N): the largest over images of an expert's mean weight, see Recording. cells: where that is
    below the threshold; never all experts at once. costs (K,): operations of one expert from the fused stage before up to this one.
    """

    experts: tuple[str, ...]
    stages: tuple[str, ...]
    most: NDArray[np.float32]
    costs: NDArray[np.float64]
    threshold: float = DROPPED

    @property
    def cells(self) -> NDArray[np.bool_]:
        return self.most < min(self.threshold, 1 / len(self.experts))

    @property
    def counts(self) -> NDArray[np.int64]:
        """In how many cells each expert is unused (N,)."""
        return self.cells.sum((0, 1))

    @property
    def total(self) -> int:
        """Cells an expert has: passes times fused stages."""
        return int(np.prod(self.cells.shape[:2]))

    @property
    def saved(self) -> NDArray[np.float64]:
        """What leaving each expert out there would save (N,), as a share of all experts' arithmetic. An estimate: see the docs."""
        everything = len(self.most) * self.costs.sum() * len(self.experts)
        return np.einsum("pkn,k->n", self.cells, self.costs) / everything

    def sentences(self) -> list[str]:
        """What can be said, an expert each, and of all together."""
        lines = []
        for name, count, saved in zip(self.experts, self.counts, self.saved, strict=True):
            share = f"{count} of {self.total} stage-steps ({count / self.total:.0%})"
            cost = f"; skipping it there would save about {saved:.1%} of the experts' arithmetic" if count else ""
            lines.append(f"{name} is below {self.threshold:g} at {share}{cost}.")
        return [*lines, f"Together about {self.saved.sum():.1%} of the experts' arithmetic; an estimate by operations, not a measured time."]


def find_unused(
    denoiser: EnsembleDenoiser, most: Sequence[NDArray[np.float32]], stage_costs: Mapping[str, int], threshold: float = DROPPED
) -> Unused:
    """most: of every image, from its recording; stage_costs: of one expert, by stage, fused or not."""
    costs, running = [], 0.0
    for stage in denoiser.stages:  # an expert that is not used at a fused stage was not needed since the one before
        running += stage_costs[stage.name]
        if stage.name in denoiser.fused:
            costs.append(running)
            running = 0.0
    return Unused(denoiser.names, tuple(denoiser.fused), np.max(np.stack(most), axis=0), np.asarray(costs), threshold)


class Skipping:
    """An adjuster that leaves experts out where they are unused, and gives their weight to the others in proportion.

    Passes are counted by the first fused stage, the two that guidance may make of a step apart.
    """

    def __init__(self, denoiser: EnsembleDenoiser, unused: Unused) -> None:
        self.denoiser, self.unused = denoiser, unused
        self._passes = {False: -1, True: -1}

    def __call__(self, stage: str, weights: Tensor) -> Tensor:
        place = self.unused.stages.index(stage)
        self._passes[self.denoiser.aside] += place == 0
        cells = self.unused.cells[self._passes[self.denoiser.aside], place]
        return without(weights, ~torch.from_numpy(cells))


def without(weights: Tensor, kept: Tensor) -> Tensor:
    """weights (R, N, H, W) of the experts that are kept (N,) bool, brought back to sum 1; where they all weigh nothing, they share alike."""
    factors = kept.to(weights)[None, :, None, None]
    total = (weights * factors).sum(1, keepdim=True)
    return torch.where(total > 0, weights * factors / total.clamp_min(torch.finfo(total.dtype).tiny), factors / factors.sum())
