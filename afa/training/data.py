"""The training set: captioned images, each read once and kept as VAE latents."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afa.data.images import UNREADABLE, Crop, reason, square
from afa.data.sources import ImageSource, Sample, Skipped
from afa.errors import UserError
from afa.images import open_image
from afa.latents import latents_of
from afa.store import StoredRows

EMPTY = torch.empty(0)
AHEAD = 4  # batches decoded before they are needed
FEWEST = 5  # images, a fifth of them held out
Work = tuple[Sample, Sequence[Crop]]


def count_held_out(samples: Sequence[Any], asked: int) -> int:
    """Return how many samples are held out: as many as are asked for, at most a fifth."""
    return min(asked, len(samples) // 5)


def split(samples: Sequence[Any], held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Split samples at random into training and held-out samples.

    held_out: number of held-out samples, at most a fifth of all
    Raises UserError for fewer than five samples.
    """
    if len(samples) < FEWEST:
        raise UserError(
            f"{len(samples)} captioned images are too few to train on; at least {FEWEST} are needed, "
            "a fifth of them held out"
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    count = count_held_out(samples, held_out)
    return [samples[index] for index in sorted(order[count:])], [
        samples[index] for index in sorted(order[:count])
    ]


def check_skipped(source: ImageSource, share: float) -> None:
    """Raise UserError if more than a share of the images was left out."""
    skipped = len(source.skipped)
    total = source.listed
    if skipped > share * total:
        raise UserError(
            f"{skipped} of the {total} images of {source.origin} cannot be used, "
            f"more than --max-skipped {share:g} allows: "
            f"{source.skipped.summary()}"
        )


@dataclass(frozen=True)
class Encoded:
    """Encoded images: `variants` consecutive rows per image.

    moments:  (rows, 2C, h, w) of the VAE's posterior, in memory or in a cache
    captions: of each row
    sizes:    (rows, 6) SDXL's size conditions
    digest:   changes when an image, a caption or their order changes
    variants: crops of each image
    """

    moments: Tensor | StoredRows
    captions: list[str]
    sizes: Tensor
    digest: str = ""
    variants: int = 1

    def __len__(self) -> int:
        return len(self.captions) // self.variants

    def joined(self, images: "Encoded") -> "Encoded":
        """Return captions without images, followed by those of images; their moments are not in it."""
        captions, sizes = self.captions + images.captions, torch.cat([self.sizes, images.sizes])
        return Encoded(EMPTY, captions, sizes, f"{self.digest} {images.digest}")

    def rows(self, images: list[int], rng: torch.Generator) -> list[int]:
        """Return one row of each image, drawn at random from its variants."""
        if self.variants == 1:
            return images
        drawn = torch.randint(self.variants, (len(images),), generator=rng).tolist()
        return [image * self.variants + variant for image, variant in zip(images, drawn, strict=True)]


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images; held-out images are cropped at the centre.

    crops: number of random crops per image; 0: the centre
    flip:  mirror half of the random crops
    """

    crops: int = 0
    flip: bool = False

    def of(self, resolution: int, seed: int, index: int) -> list[Crop]:
        """Return the crops of the image at this index of the set."""
        return [Crop(resolution, (seed, index, copy), self.flip) for copy in range(self.crops)] or [
            Crop(resolution)
        ]


@dataclass(frozen=True)
class ImageRow:
    """One square crop of an image.

    size:   SDXL's size conditions
    sha256: of the image's bytes
    """

    pixels: Tensor
    size: tuple[float, ...]
    sample: Sample
    crop: Crop
    sha256: bytes


def encode(
    work: Sequence[Work], vae: Any, batch_size: int, skipped: Skipped, progress: Any = iter
) -> Encoded:
    """Encode all crops of all images once, in memory. Unreadable images are noted in `skipped`.

    work:     samples with their crops, the same number for each
    progress: wraps the iteration over images, for example in a progress bar
    Raises UserError if no image can be read.
    """
    moments: list[Tensor] = []
    rows: list[ImageRow] = []
    for batch in batches(work, batch_size, skipped, progress):
        moments.append(moments_of(vae, batch))
        rows += [replace(row, pixels=EMPTY) for row in batch]
    if not moments:
        raise UserError(f"none of the images can be read: {skipped.summary()}")
    return Encoded(
        torch.cat(moments),
        [row.sample.caption for row in rows],
        torch.tensor([row.size for row in rows]),
        digest(rows),
        len(work[0][1]),
    )


def digest(rows: Iterable[Any]) -> str:
    """Return a hash of images and captions in order. Each row has sha256 and sample."""
    total = hashlib.sha256()
    for row in rows:
        total.update(row.sha256 + row.sample.caption.encode())
    return total.hexdigest()


@torch.no_grad()
def moments_of(vae: Any, batch: Sequence[ImageRow]) -> Tensor:
    """Return the VAE's posterior of each row: (B, 2C, h, w) float32 on the CPU."""
    first = next(vae.parameters())
    images = torch.stack([row.pixels for row in batch]).to(first.device, first.dtype)
    return latents_of(vae).moments(vae, images).float().cpu()


def batches(
    work: Sequence[Work], size: int, skipped: Skipped, progress: Any = iter
) -> Iterator[list[ImageRow]]:
    """Yield all rows in order, `size` at once; several threads read ahead."""
    images = progress(_read_ahead(work, AHEAD * size, skipped))
    rows = (row for image in images for row in image or ())
    while batch := list(islice(rows, size)):
        yield batch


def _read_ahead(work: Sequence[Work], ahead: int, skipped: Skipped) -> Iterator[list[ImageRow] | None]:
    """Yield the rows of each image in order; None for an image that cannot be read."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        rest = iter(work)
        waiting = deque(pool.submit(_read, *item) for item in islice(rest, ahead))
        for sample, _ in work:
            rows = waiting.popleft().result()
            waiting.extend(pool.submit(_read, *item) for item in islice(rest, 1))
            if isinstance(rows, str):
                skipped.add(rows, sample.name)
            yield None if isinstance(rows, str) else rows


def _read(sample: Sample, crops: Sequence[Crop]) -> list[ImageRow] | str:
    """Return the rows of an image, or the reason why there are none."""
    try:
        data = sample.read()
        image, sha256 = open_image(data, sample.name), hashlib.sha256(data).digest()
        return [ImageRow(*square(image, crop), sample, crop, sha256) for crop in crops]
    except UNREADABLE as error:
        return reason(error)
