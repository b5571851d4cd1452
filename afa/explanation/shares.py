"""Mean weights of the experts: by stage, by step and by place in the image."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.explanation.recording import Recording
from afa.pictures import LIGHT, Ground, mean_over_stages, overlay
from afa.stats import Estimate, estimate
from afa.training.measure import BANDS, GROUPS

HALVED_FROM = 8  # from so many transformer blocks of one kind on, they form two groups
FINAL = "final"  # the last stage, where predictions become one


def stage_groups(stages: Sequence[str]) -> dict[str, list[str]]:
    """Group stages: IN, M, OUT and the final stage of a U-Net; blocks of one kind of a transformer.

    Transformer blocks form two groups from HALVED_FROM blocks of one kind on.
    """
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
    """Return the timestep band of each pass, from 0 (least noise) to BANDS - 1."""
    return (np.asarray(timesteps) * BANDS / train_timesteps).astype(np.int64).clip(0, BANDS - 1)


@dataclass(frozen=True)
class Shares:
    """The mean weights of one image.

    experts: names (N)
    groups:  names of the groups of stages (G)
    weights: (G, BANDS, N) means over passes, stages and places; sum 1 over N; nan where a band has no pass
    """

    experts: tuple[str, ...]
    groups: tuple[str, ...]
    weights: NDArray[np.float64]

    @property
    def total(self) -> NDArray[np.float64]:
        """(N,) each expert's mean over groups and bands."""
        return np.nanmean(self.weights, axis=(0, 1))


def shares(recording: Recording, train_timesteps: int) -> Shares:
    """Compute the mean weights of one image.

    train_timesteps: number of timesteps of the noise schedule; the bands are equal parts of it
    """
    groups, own = stage_groups(recording.stages), bands(recording.timesteps, train_timesteps)
    found = np.full((len(groups), BANDS, len(recording.experts)), np.nan)
    for row, members in enumerate(groups.values()):
        columns = [recording.stages.index(stage) for stage in members]
        for band in np.unique(own):
            found[row, band] = recording.means[own == band][:, columns].mean((0, 1))
    return Shares(recording.experts, tuple(groups), found)


def estimates(several: Sequence[NDArray[np.float64]]) -> NDArray[np.object_]:
    """Return for every cell the Estimate over images; None where no image has a value."""
    stacked = np.stack(several)
    found = np.empty(stacked.shape[1:], dtype=object)
    for place in np.ndindex(found.shape):
        values = stacked[:, *place]
        values = values[~np.isnan(values)]
        found[place] = estimate(values) if len(values) else None
    return found


def as_data(found: Estimate | None) -> dict[str, float | int | None] | None:
    """Convert an Estimate to JSON values; low and high are null for a single image."""
    if found is None:
        return None
    around = {"low": None, "high": None} if found.n == 1 else {"low": found.low, "high": found.high}
    return {"value": found.value, **around, "n": found.n}


SHARP = 8  # power in lead_at


def weights_at(
    recording: Recording,
    passes: int | Sequence[int] | None = None,
    stages: str | Sequence[str] | None = None,
    side: tuple[int, int] | None = None,
) -> NDArray[np.float32]:
    """Average the weights over passes and stages.

    passes: indices of passes; None: all
    stages: names of fused stages; None: all
    side:   height and width of the result in pixels; None: those of the image
    Returns (N, H, W) that sums to 1 over N.
    """
    chosen = (
        range(len(recording.timesteps))
        if passes is None
        else [passes]
        if isinstance(passes, int)
        else list(passes)
    )
    names = recording.stages if stages is None else [stages] if isinstance(stages, str) else stages
    maps: dict[str, Tensor] = {
        name: recording.maps[name][list(chosen)].float().mean(0, keepdim=True) for name in names
    }
    height, width = side or recording.image.shape[:2]
    found: NDArray[np.float32] = mean_over_stages(maps, (height, width))[0].numpy()
    return found


def overlay_at(
    recording: Recording, passes: int | Sequence[int] | None = None, stages: str | Sequence[str] | None = None
) -> NDArray[np.uint8]:
    """Return the image in grey, tinted with the experts' colours by weight: (H, W, 3) uint8.

    passes, stages: see weights_at
    """
    return overlay(recording.image, weights_at(recording, passes, stages))


def lead_at(
    recording: Recording, passes: int | Sequence[int] | None = None, stages: str | Sequence[str] | None = None
) -> NDArray[np.uint8]:
    """Return the image tinted by the expert whose weight is above its own mean: (H, W, 3) uint8.

    Weights are divided by their means over the map, and the differences are sharpened. If one expert has the
    largest weight everywhere, overlay_at shows only its colour; this picture shows where each expert leads.
    passes, stages: see weights_at
    """
    weights = weights_at(recording, passes, stages)
    lead = (weights / np.maximum(weights.mean((1, 2), keepdims=True), 1e-6)) ** SHARP
    return overlay(recording.image, lead / np.maximum(lead.sum(0), 1e-9))


def resized(places: NDArray[np.floating], side: tuple[int, int]) -> NDArray[np.float32]:
    """Resize one map (h, w) bilinearly to side (H, W)."""
    found = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(places, np.float32))[None, None], size=side, mode="bilinear"
    )
    array: NDArray[np.float32] = found[0, 0].numpy()
    return array


def spotlight(
    image: NDArray[np.uint8], places: NDArray[np.floating], ground: Ground = LIGHT
) -> NDArray[np.uint8]:
    """Fade the image to the ground where `places` (h, w) is small, over that map's range: (H, W, 3) uint8."""
    height, width = image.shape[:2]
    light = resized(places, (height, width))
    low, high = float(light.min()), float(light.max())
    light = 0.08 + 0.92 * ((light - low) / (high - low) if high > low else np.ones_like(light))
    paper = np.asarray(ground.paper, np.float32)
    return (paper - light[..., None] * (paper - image.astype(np.float32))).round().astype(np.uint8)
