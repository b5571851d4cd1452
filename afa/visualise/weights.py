"""Weight maps as pictures: which expert shaped which part of an image, over steps and stages."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa.denoiser.hooks import WeightMaps
from afa.visualise.grid import grid

# One colour an expert, told apart by most kinds of colour vision. Source: Okabe and Ito (2008).
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178), (240, 228, 66), (90, 90, 90))


def conditional(maps: WeightMaps, images: int) -> list[dict[str, Tensor]]:
    """The maps of the conditional half, by pass and stage, (images, N, H, W): guidance puts the unconditional half first."""
    return [{name: weights[-images:] for name, weights in one.items()} for one in maps.maps]


def mean_over_stages(maps: dict[str, Tensor], side: tuple[int, int]) -> Tensor:
    """One map of a pass: the mean over fused stages, each brought to `side` (H, W). -> (B, N, H, W), still convex."""
    resized = [torch.nn.functional.interpolate(weights, size=side, mode="bilinear", align_corners=False) for weights in maps.values()]
    return torch.stack(resized).mean(0)


def overlay(image: NDArray[np.uint8], weights: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The image in grey, tinted by the experts' colours: image (H, W, 3), weights (N, H, W) convex -> (H, W, 3) uint8."""
    palette = np.asarray(COLOURS, np.float32)
    tint = np.einsum("nhw,nc->hwc", weights, palette[np.arange(len(weights)) % len(palette)])
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    return np.clip(0.35 * grey + 0.65 * tint * (0.4 + 0.6 * grey / 255), 0, 255).astype(np.uint8)


def heat(weights: NDArray[np.floating], colour: Sequence[int]) -> NDArray[np.uint8]:
    """One expert's weights (H, W) in [0, 1]: white is 0, the expert's colour is 1. -> (H, W, 3) uint8."""
    full = np.asarray(colour, np.float32)
    return (255 - (255 - full) * np.clip(weights, 0, 1)[..., None]).astype(np.uint8)


def picture(image: NDArray[np.uint8], maps: Sequence[dict[str, Tensor]], experts: Sequence[str], timesteps: Sequence[float]) -> Image.Image:
    """One image's weights over its steps: a row per expert, a column per shown step, the last column over the whole image.

    maps: of this image, by pass and stage, (N, h, w).
    """
    side = image.shape[:2]
    shown = np.linspace(0, len(maps) - 1, min(5, len(maps))).round().astype(int)
    over_steps = [mean_over_stages({name: w[None] for name, w in maps[index].items()}, side)[0].numpy() for index in range(len(maps))]
    rows = []
    for index in range(len(experts)):
        colour = COLOURS[index % len(COLOURS)]
        rows.append([heat(over_steps[step][index], colour) for step in shown])
    mean = np.mean(over_steps, axis=0)
    rows[0] += [image]
    if len(rows) > 1:
        rows[1] += [overlay(image, mean)]
    columns = [f"t = {timesteps[step]:.0f}" for step in shown] + ["image, weights"]
    return grid(rows, columns=columns, labels=[f"{name} {mean[index].mean():.2f}" for index, name in enumerate(experts)], side=max(128, side[1]))
