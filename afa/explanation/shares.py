"""How much each expert weighs: by band of timesteps and by group of stages."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afa.evaluation.statistics import Estimate, estimate
from afa.explanation.recording import Recording
from afa.training.routing import BANDS, GROUPS

HALVED_FROM = 8  # stages of one kind; so many transformer blocks are two groups
FINAL = "final"  # the last stage, where predictions become one


def stage_groups(stages: Sequence[str]) -> dict[str, list[str]]:
    """Stages by what they are part of: IN, M, OUT and the final one; of transformers, blocks of a kind, many of them in two halves."""
    groups: dict[str, list[str]] = {}
    for stage in stages[:-1]:
        kind = re.match(r"[A-Za-z]*", stage)
        groups.setdefault(kind.group() if kind else stage, []).append(stage)
    halves: dict[str, list[str]] = {}
    for kind, own in groups.items():
        middle = (len(own) + 1) // 2
        parts = [own] if kind in GROUPS or len(own) < HALVED_FROM else [own[:middle], own[middle:]]
        halves |= {kind if len(parts) == 1 else f"{part[0]}-{part[-1]}": part for part in parts}
    return halves | {FINAL: [stages[-1]]}


def bands(timesteps: Sequence[float], train_timesteps: int) -> NDArray[np.int64]:
    """The band of each pass, from 0 (least noise) to BANDS - 1."""
    return (np.asarray(timesteps) * BANDS / train_timesteps).astype(np.int64).clip(0, BANDS - 1)


@dataclass(frozen=True)
class Shares:
    """weights (G, BANDS, N): of one image, means over passes, stages and places, each with sum 1 over experts; nan: a band without a pass."""

    experts: tuple[str, ...]
    groups: tuple[str, ...]
    weights: NDArray[np.float64]

    @property
    def total(self) -> NDArray[np.float64]:
        """Each expert's mean over groups and bands (N,)."""
        return np.nanmean(self.weights, axis=(0, 1))


def shares(recording: Recording, train_timesteps: int) -> Shares:
    """Of one image. train_timesteps: of the noise schedule, of which the bands are equal parts."""
    groups, own = stage_groups(recording.stages), bands(recording.timesteps, train_timesteps)
    found = np.full((len(groups), BANDS, len(recording.experts)), np.nan)
    for row, members in enumerate(groups.values()):
        columns = [recording.stages.index(stage) for stage in members]
        for band in np.unique(own):
            found[row, band] = recording.means[own == band][:, columns].mean((0, 1))
    return Shares(recording.experts, tuple(groups), found)


def estimates(several: Sequence[NDArray[np.float64]]) -> NDArray[np.object_]:
    """Cell by cell the Estimate over images; None where no image has a value."""
    stacked = np.stack(several)
    found = np.empty(stacked.shape[1:], dtype=object)
    for place in np.ndindex(found.shape):
        values = stacked[:, *place]
        values = values[~np.isnan(values)]
        found[place] = estimate(values) if len(values) else None
    return found


def as_data(found: Estimate | None) -> dict[str, float | int | None] | None:
    """For JSON: of a single image, low and high are null."""
    if found is None:
        return None
    around = {"low": None, "high": None} if found.n == 1 else {"low": found.low, "high": found.high}
    return {"value": found.value, **around, "n": found.n}
