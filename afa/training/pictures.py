"""From an encoded image to the pixels that are trained on: decoded whole, turned upright, cropped to a square."""

import io
import struct
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from afa.training.sources.base import Sample

# What Pillow raises for data that are no whole image: each is one of these.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Crop:
    """How a square is cut from an image. place: None for the centre, else a seed of where, and of whether it is mirrored.

    flip: half of the crops at random places are mirrored.
    """

    resolution: int
    place: tuple[int, ...] | None = None
    flip: bool = False


def decode(data: bytes) -> Image.Image:
    """The whole image, upright, in RGB. Raises one of UNREADABLE for what is none, or was cut off."""
    with Image.open(io.BytesIO(data)) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def looks_whole(sample: Sample) -> bool:
    """Whether an image can be opened, without decoding it: what is cut off at its end may pass."""
    try:
        with Image.open(io.BytesIO(sample.read())) as image:
            image.verify()
    except UNREADABLE:
        return False
    return True


def square(image: Image.Image, crop: Crop) -> tuple[Tensor, tuple[float, ...]]:
    """The shorter side is resized to the resolution, and the square cut from the longer one."""
    resolution, original = crop.resolution, (float(image.height), float(image.width))
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top, mirrored = _place(crop, width - resolution, height - resolution)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if mirrored:
        image = ImageOps.mirror(image)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (*original, float(top), float(left), float(resolution), float(resolution))


def _place(crop: Crop, width: int, height: int) -> tuple[int, int, bool]:
    """-> left, top, whether to mirror; width and height: how much there is to choose from."""
    if crop.place is None:
        return width // 2, height // 2, False
    rng = np.random.default_rng(crop.place)
    left, top = (int(rng.integers(extent + 1)) for extent in (width, height))
    return left, top, crop.flip and bool(rng.random() < 0.5)
