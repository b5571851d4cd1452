"""Weight maps of a recording as arrays: of which passes, of which stages. For pictures, pages and whoever wants numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.explanation.recording import Recording
from afa.visualise.weights import mean_over_stages, overlay

SHARP = 8  # power in lead_at


def weights_at(
    recording: Recording, passes: int | Sequence[int] | None = None, stages: str | Sequence[str] | None = None, side: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Mean weights over some passes and stages, None: all: (N, H, W), convex over N. side: H and W, default the image's."""
    chosen = range(len(recording.timesteps)) if passes is None else [passes] if isinstance(passes, int) else list(passes)
    names = recording.stages if stages is None else [stages] if isinstance(stages, str) else stages
    maps: dict[str, Tensor] = {name: recording.maps[name][list(chosen)].float().mean(0, keepdim=True) for name in names}
    height, width = side or recording.image.shape[:2]
    found: NDArray[np.float32] = mean_over_stages(maps, (height, width))[0].numpy()
    return found


def overlay_at(recording: Recording, passes: int | Sequence[int] | None = None, stages: str | Sequence[str] | None = None) -> NDArray[np.uint8]:
    """The image in grey, tinted by who weighs where: (H, W, 3) uint8. passes, stages: see weights_at."""
    return overlay(recording.image, weights_at(recording, passes, stages))


def lead_at(recording: Recording, passes: int | Sequence[int] | None = None, stages: str | Sequence[str] | None = None) -> NDArray[np.uint8]:
    """The image, tinted by who weighs more there than elsewhere: weights by their means over the map, the differences sharpened.

    Where one expert weighs most everywhere, overlay_at shows nothing but that one; this shows what belongs to whom.
    """
    weights = weights_at(recording, passes, stages)
    lead = (weights / np.maximum(weights.mean((1, 2), keepdims=True), 1e-6)) ** SHARP
    return overlay(recording.image, lead / np.maximum(lead.sum(0), 1e-9))


def resized(places: NDArray[np.floating], side: tuple[int, int]) -> NDArray[np.float32]:
    """One map (h, w) -> (H, W)."""
    found = torch.nn.functional.interpolate(torch.from_numpy(np.asarray(places, np.float32))[None, None], size=side, mode="bilinear")
    array: NDArray[np.float32] = found[0, 0].numpy()
    return array


def spotlight(image: NDArray[np.uint8], places: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The image where `places` (h, w) is large, faded to white where it is small, over the map's own range: (H, W, 3) uint8."""
    height, width = image.shape[:2]
    light = resized(places, (height, width))
    low, high = float(light.min()), float(light.max())
    light = 0.08 + 0.92 * ((light - low) / (high - low) if high > low else np.ones_like(light))
    return (255 - light[..., None] * (255 - image.astype(np.float32))).round().astype(np.uint8)
