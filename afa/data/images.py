"""Decode an image and cut out a square, or another size, for training."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from afa.data.sources import BROKEN, LeftOutError, Sample
from afa.errors import UserError
from afa.images import MOST_PIXELS, ImageError, open_image

T = TypeVar("T")
MANY = 500  # images, checked with a bar
UNREADABLE = (OSError, UserError)  # what a sample's read and decode raise for an image that cannot be used


@dataclass(frozen=True)
class Crop:
    """What is cut from an image.

    resolution: side of a square in pixels
    place:      None: the centre; else a seed of where it is cut, and of whether it is mirrored
    flip:       mirror half of the crops at random places
    bucket:     height and width in pixels of what is cut instead of a square; None: a square
    """

    resolution: int
    place: tuple[int, ...] | None = None
    flip: bool = False
    bucket: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.bucket or (self.resolution, self.resolution)


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

    return of_each(samples, stopped, "checking pictures")


def of_each(samples: Sequence[Sample], look: Callable[[Sample], T], what: str) -> list[T]:
    """Look at all samples with several threads. what: is done, for a bar where they are many"""
    bar = tqdm(desc=what, unit="image", total=len(samples), file=sys.stderr, disable=len(samples) < MANY)
    with ThreadPoolExecutor() as pool, bar:
        found = []
        for one in pool.map(look, samples):
            found.append(one)
            bar.update()
        return found


def cut(image: Image.Image, crop: Crop) -> tuple[Tensor, tuple[float, ...]]:
    """Resize an image so that it just covers the crop's size, and cut off what is longer.

    Returns pixels (3, height, width) in [-1, 1], and SDXL's size conditions: height and width of the image,
    top and left of the cut in the resized image, height and width of the cut.
    Raises ImageError for a strip so narrow that it would not fit into memory.
    """
    (tall, wide), original = crop.size, (float(image.height), float(image.width))
    scale = max(tall / image.height, wide / image.width)
    width, height = max(wide, round(image.width * scale)), max(tall, round(image.height * scale))
    if width * height > MOST_PIXELS:
        raise ImageError(
            f"a picture of {image.width} × {image.height} pixels is too narrow to cover {wide} × {tall}"
        )
    left, top, mirrored = _place(crop, width - wide, height - tall)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if mirrored:
        image = ImageOps.mirror(image)
    image = image.crop((left, top, left + wide, top + tall))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (*original, float(top), float(left), float(tall), float(wide))


def _place(crop: Crop, width: int, height: int) -> tuple[int, int, bool]:
    """Return left, top, and whether to mirror.

    width, height: the free space in pixels
    """
    if crop.place is None:
        return width // 2, height // 2, False
    rng = np.random.default_rng(crop.place)
    left, top = (int(rng.integers(extent + 1)) for extent in (width, height))
    return left, top, crop.flip and bool(rng.random() < 0.5)
