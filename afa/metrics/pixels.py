"""Resize images of any size to the tensors that networks take."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Image8 = NDArray[np.uint8]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crop(image: Image8, side: int) -> Image8:
    """Resize the shorter side (bicubic, antialiased) and cut out the centre: (H, W, 3) to (side, side, 3)."""
    height, width = image.shape[:2]
    short = min(height, width)
    resized = _resize(image, int(side * width / short), int(side * height / short))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    return resized[top : top + side, left : left + side]


def stretch(image: Image8, side: int) -> Image8:
    """Resize both sides, without keeping proportions: (H, W, 3) to (side, side, 3)."""
    return _resize(image, side, side)


def pad(image: Image8, side: int) -> Image8:
    """Resize the longer side and add black beside the shorter one: (H, W, 3) to (side, side, 3)."""
    height, width = image.shape[:2]
    long = max(height, width)
    resized = _resize(image, round(width * side / long), round(height * side / long))
    canvas = np.zeros((side, side, 3), np.uint8)
    top, left = (side - resized.shape[0]) // 2, (side - resized.shape[1]) // 2
    canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return canvas


def _resize(image: Image8, width: int, height: int) -> Image8:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def fit_tensor(images: Tensor, side: int, fit: str) -> Tensor:
    """Resize (B, 3, H, W) in [-1, 1] to (B, 3, side, side), normalised for CLIP, with gradients.

    fit: as in FITS
    """
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    sizes = {
        "crop": (int(side * height / short), int(side * width / short)),
        "stretch": (side, side),
        "pad": (round(height * side / long), round(width * side / long)),
    }
    pixels = images / 2 + 0.5
    if sizes[fit] != (height, width):
        pixels = torch.nn.functional.interpolate(pixels, size=sizes[fit], mode="bicubic", antialias=True)
    down, right = (side - size for size in sizes[fit])  # below 0: cut away
    top, left = int(down / 2), int(right / 2)
    pixels = torch.nn.functional.pad(pixels, (left, right - left, top, down - top))
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD)
    )
    return (pixels - mean) / std


FITS: dict[str, Callable[[Image8, int], Image8]] = {"crop": crop, "stretch": stretch, "pad": pad}


def to_tensor(images: Sequence[Image8], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (n, 3, H, W) float32, normalised by channel, from images of one size."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
