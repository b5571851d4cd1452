"""The training set: captioned images from a source, each read once, kept as the VAE's latents."""

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
from afa.data.sources import Sample, Skipped, Source
from afa.errors import UserError
from afa.images import open_image
from afa.latents import latents_of
from afa.store import StoredRows

EMPTY = torch.empty(0)
AHEAD = 4  # batches decoded before they are needed
FEWEST = 5  # images, a fifth of them held out
Work = tuple[Sample, Sequence[Crop]]


def split(samples: Sequence[Any], held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """-> training samples, held-out samples: `held_out` of them, at most a fifth. Raises UserError for fewer than five."""
    if len(samples) < FEWEST:
        raise UserError(
            f"{len(samples)} captioned images are too few to train on; at least {FEWEST} are needed, a fifth of them held out"
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    count = min(held_out, len(samples) // 5)
    return [samples[index] for index in sorted(order[count:])], [
        samples[index] for index in sorted(order[:count])
    ]


def check_skipped(source: Source, share: float) -> None:
    """Raises UserError if more than a share of the images had to be left out."""
    skipped = len(source.skipped)
    total = source.listed
    if skipped > share * total:
        raise UserError(
            f"{skipped} of the {total} images of {source.origin} cannot be used, more than --max-skipped {share:g} allows: "
            f"{source.skipped.summary()}"
        )


@dataclass(frozen=True)
class Encoded:
    """Images as the experts see them, `variants` rows an image, one after another.

    moments (rows, 2C, h, w): of the VAE's posterior, in memory or in a cache. captions: of each row. sizes (rows, 6): SDXL's size conditions.
    digest: changes when an image, a caption or their order does.
    """

    moments: Tensor | StoredRows
    captions: list[str]
    sizes: Tensor
    digest: str = ""
    variants: int = 1

    def __len__(self) -> int:
        return len(self.captions) // self.variants

    def rows(self, images: list[int], rng: torch.Generator) -> list[int]:
        """One row of each image, drawn where it has several."""
        if self.variants == 1:
            return images
        drawn = torch.randint(self.variants, (len(images),), generator=rng).tolist()
        return [image * self.variants + variant for image, variant in zip(images, drawn, strict=True)]


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; held-out ones keep their centre. crops: at random places of each, 0 for its centre."""

    crops: int = 0
    flip: bool = False

    def of(self, resolution: int, seed: int, index: int) -> list[Crop]:
        """The crops of the image with that place in the set."""
        return [Crop(resolution, (seed, index, copy), self.flip) for copy in range(self.crops)] or [
            Crop(resolution)
        ]


@dataclass(frozen=True)
class Row:
    """One square of an image. sha256: of the image's bytes. size: as SDXL is told of it."""

    pixels: Tensor
    size: tuple[float, ...]
    sample: Sample
    crop: Crop
    sha256: bytes


def encode(
    work: Sequence[Work], vae: Any, batch_size: int, skipped: Skipped, progress: Any = iter
) -> Encoded:
    """Encode every crop of every image once, in memory; an image that cannot be read is left out and noted in `skipped`.

    work: samples with their crops, equally many each. progress: wraps the iteration over images, e.g. in a bar.
    Raises UserError if no image can be read.
    """
    moments: list[Tensor] = []
    rows: list[Row] = []
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
    """Of images and captions in their order; rows: have sha256 and sample."""
    total = hashlib.sha256()
    for row in rows:
        total.update(row.sha256 + row.sample.caption.encode())
    return total.hexdigest()


@torch.no_grad()
def moments_of(vae: Any, batch: Sequence[Row]) -> Tensor:
    """The VAE's posterior of each row: (B, 2C, h, w) float32 on the CPU."""
    first = next(vae.parameters())
    images = torch.stack([row.pixels for row in batch]).to(first.device, first.dtype)
    return latents_of(vae).moments(vae, images).float().cpu()


def batches(work: Sequence[Work], size: int, skipped: Skipped, progress: Any = iter) -> Iterator[list[Row]]:
    """All rows in order, so many at once, read by several threads ahead of their use."""
    images = progress(_read_ahead(work, AHEAD * size, skipped))
    rows = (row for image in images for row in image or ())
    while batch := list(islice(rows, size)):
        yield batch


def _read_ahead(work: Sequence[Work], ahead: int, skipped: Skipped) -> Iterator[list[Row] | None]:
    """The rows of every image in order; None for one that cannot be read."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        rest = iter(work)
        waiting = deque(pool.submit(_read, *item) for item in islice(rest, ahead))
        for sample, _ in work:
            rows = waiting.popleft().result()
            waiting.extend(pool.submit(_read, *item) for item in islice(rest, 1))
            if isinstance(rows, str):
                skipped.add(rows, sample.name)
            yield None if isinstance(rows, str) else rows


def _read(sample: Sample, crops: Sequence[Crop]) -> list[Row] | str:
    """The rows of an image, or why there are none."""
    try:
        data = sample.read()
        image, sha256 = open_image(data, sample.name), hashlib.sha256(data).digest()
        return [Row(*square(image, crop), sample, crop, sha256) for crop in crops]
    except UNREADABLE as error:
        return reason(error)
