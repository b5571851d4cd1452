"""Decode an image and cut out a square for training."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from afa.data.sources import BROKEN, LeftOutError, Sample
from afa.errors import UserError
from afa.images import MOST_PIXELS, ImageError, open_image

MANY = 500  # images, checked with a bar
UNREADABLE = (OSError, UserError)  # what a sample's read and decode raise for an image that cannot be used


@dataclass(frozen=True)
class Crop:
    """How a square is cut from an image.

    resolution: side of the square in pixels
    place:      None: the centre; else a seed of where it is cut, and of whether it is mirrored
    flip:       mirror half of the crops at random places
    """

    resolution: int
    place: tuple[int, ...] | None = None
    flip: bool = False


def reason(error: Exception) -> str:
    """Return why an image is left out, given one of UNREADABLE."""
    return str(error) if isinstance(error, LeftOutError) else BROKEN


def unreadable(samples: Sequence[Sample]) -> list[Exception | None]:
    """Decode all images, with several threads; return an error or None for each."""

    def stopped(sample: Sample) -> Exception | None:
        try:
            open_image(sample.read(), sample.name)
        except UNREADABLE as error:
            return error
        return None

    bar = tqdm(
        desc="checking pictures",
        unit="image",
        total=len(samples),
        file=sys.stderr,
        disable=len(samples) < MANY,
    )
    with ThreadPoolExecutor() as pool, bar:
        found = []
        for error in pool.map(stopped, samples):
            found.append(error)
            bar.update()
        return found


def square(image: Image.Image, crop: Crop) -> tuple[Tensor, tuple[float, ...]]:
    """Resize the shorter side to the resolution and cut the square from the longer one.

    Raises ImageError for a strip so narrow that it would not fit into memory.
    """
    resolution, original = crop.resolution, (float(image.height), float(image.width))
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if width * height > MOST_PIXELS:
        raise ImageError(
            f"a picture of {image.width} × {image.height} pixels is too narrow for squares of {resolution}"
        )
    left, top, mirrored = _place(crop, width - resolution, height - resolution)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if mirrored:
        image = ImageOps.mirror(image)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (*original, float(top), float(left), float(resolution), float(resolution))


def _place(crop: Crop, width: int, height: int) -> tuple[int, int, bool]:
    """Return left, top, and whether to mirror.

    width, height: the free space in pixels
    """
    if crop.place is None:
        return width // 2, height // 2, False
    rng = np.random.default_rng(crop.place)
    left, top = (int(rng.integers(extent + 1)) for extent in (width, height))
    return left, top, crop.flip and bool(rng.random() < 0.5)
