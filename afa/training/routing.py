"""Where the weights go: the mean weight of every expert and the entropy, by stage group and by band of timesteps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BANDS = 4  # equal parts of the timesteps, the first with the least noise
GROUPS = ("IN", "M", "OUT")  # how the names of stages begin; whatever begins otherwise is a group by itself
DROPPED = 0.02  # a mean weight below this, everywhere, is an expert that is not used


def bands_of(timesteps: Tensor, train_timesteps: int) -> NDArray[np.int64]:
    """The band of each timestep: (B,) -> (B,)."""
    found: NDArray[np.int64] = (timesteps.cpu().numpy().astype(np.int64) * BANDS // train_timesteps).clip(0, BANDS - 1)
    return found


def group_of(stage: str) -> str:
    """IN05 -> IN."""
    return next((group for group in GROUPS if stage.startswith(group)), stage)


@dataclass(frozen=True)
class Routing:
    """weights (groups, bands, N): means over stages, images and places, each group's bands summing to one over N.

    entropy (groups, bands): of the weights at a place, from 0 (one expert alone) to 1 (all alike). experts, groups: names.
    """

    experts: tuple[str, ...]
    groups: tuple[str, ...]
    weights: NDArray[np.float64]
    entropy: NDArray[np.float64]

    @property
    def shares(self) -> dict[str, float]:
        """Each expert's mean weight over all groups and bands."""
        return dict(zip(self.experts, self.weights.mean((0, 1)).tolist(), strict=True))

    @property
    def dropped(self) -> list[str]:
        """Experts that no group gives a weight worth speaking of, at any noise."""
        return [name for name, most in zip(self.experts, self.weights.max((0, 1)), strict=True) if most < DROPPED]

    def facts(self) -> dict[str, Any]:
        """For the log, rounded."""
        return {
            "bands": BANDS,
            "weights": {
                group: {name: np.round(self.weights[place, :, index], 4).tolist() for index, name in enumerate(self.experts)}
                for place, group in enumerate(self.groups)
            },
            "entropy": {group: np.round(self.entropy[place], 4).tolist() for place, group in enumerate(self.groups)},
        }


class RoutingSums:
    """Adds up weight maps, pass by pass, without keeping them. experts: names; stages: of the fused ones."""

    def __init__(self, experts: Sequence[str], stages: Sequence[str]) -> None:
        self.experts = tuple(experts)
        self.groups = tuple(dict.fromkeys(group_of(stage) for stage in stages))
        self._weights = np.zeros((len(self.groups), BANDS, len(self.experts)))
        self._entropy = np.zeros((len(self.groups), BANDS))
        self._count = np.zeros((len(self.groups), BANDS))

    def add(self, maps: Mapping[str, Tensor], bands: NDArray[np.int64]) -> None:
        """maps: by stage, (B, N, H, W); bands (B,): of each sample."""
        for stage, weights in maps.items():
            group = self.groups.index(group_of(stage))
            means = weights.double().mean((2, 3)).numpy()
            alike = torch.special.entr(weights.double()).sum(1).mean((1, 2)).numpy() / np.log(max(2, len(self.experts)))
            np.add.at(self._weights[group], bands, means)
            np.add.at(self._entropy[group], bands, alike)
            np.add.at(self._count[group], bands, 1)

    def result(self) -> Routing:
        """The means; a band without any sample counts as the group's others."""
        count = np.maximum(self._count, 1)
        weights, entropy = self._weights / count[..., None], self._entropy / count
        for group, band in zip(*np.nonzero(self._count == 0), strict=True):
            seen = self._count[group] > 0
            if seen.any():
                weights[group, band], entropy[group, band] = weights[group, seen].mean(0), entropy[group, seen].mean()
        return Routing(self.experts, self.groups, weights, entropy)
