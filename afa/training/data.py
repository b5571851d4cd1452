"""The training set: captioned images, each read once and kept as VAE latents, of one size or of several."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afa.data.buckets import Size
from afa.data.images import UNREADABLE, Crop, cut, reason
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


class MixedRows:
    """Rows of several sizes in one order, indexed as a tensor is; rows that are taken at once have one size.

    parts:  the rows of each size, (n, 2C, h, w), by any name of the size
    places: of each row, in order: the name of its size, and its place among the rows of that size
    """

    def __init__(self, parts: Mapping[Size, Tensor | StoredRows], places: Sequence[tuple[Size, int]]) -> None:
        self.parts, self.places = parts, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: list[int]) -> Tensor:
        (size,) = {self.places[row][0] for row in rows}
        return self.parts[size][[self.places[row][1] for row in rows]]


Moments = Tensor | StoredRows | MixedRows


def in_order(parts: Mapping[Size, Tensor | StoredRows], sizes: Sequence[Size]) -> Moments:
    """Return rows in one order from the rows of each size, in that order too. sizes: of each row"""
    if len(parts) == 1:
        return next(iter(parts.values()))
    seen: Counter[Size] = Counter()
    places = []
    for size in sizes:
        places.append((size, seen[size]))
        seen[size] += 1
    return MixedRows(parts, places)


@dataclass(frozen=True)
class Encoded:
    """Encoded images: `variants` consecutive rows per image.

    moments:  (rows, 2C, h, w) of the VAE's posterior, in memory or in a cache
    captions: of each row
    sizes:    (rows, 6) SDXL's size conditions; the last two are height and width of the row in pixels
    digest:   changes when an image, a caption or their order changes
    variants: crops of each image
    repeats:  how often each image counts in a pass; (): all once
    """

    moments: Moments
    captions: list[str]
    sizes: Tensor
    digest: str = ""
    variants: int = 1
    repeats: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.captions) // self.variants

    @cached_property
    def groups(self) -> list[list[int]]:
        """The images of each size, in order, each as often as it counts in a pass."""
        found: dict[tuple[float, ...], list[int]] = {}
        for image, size in enumerate(self.sizes[:: self.variants, 4:].tolist()):
            found.setdefault(tuple(size), []).extend([image] * (self.repeats[image] if self.repeats else 1))
        return [found[size] for size in sorted(found)]

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

    def of(self, resolution: int, seed: int, index: int, bucket: Size | None = None) -> list[Crop]:
        """Return the crops of the image at this index of the set. bucket: see Crop"""
        return [Crop(resolution, (seed, index, copy), self.flip, bucket) for copy in range(self.crops)] or [
            Crop(resolution, bucket=bucket)
        ]


@dataclass(frozen=True)
class ImageRow:
    """One crop of an image.

    size:   SDXL's size conditions
    sha256: of the image's bytes
    place:  among all rows
    """

    pixels: Tensor
    size: tuple[float, ...]
    sample: Sample
    crop: Crop
    sha256: bytes
    place: int = 0


def encode(
    work: Sequence[Work], vae: Any, batch_size: int, skipped: Skipped, progress: Any = iter
) -> Encoded:
    """Encode all crops of all images once, in memory. Unreadable images are noted in `skipped`.

    work:     samples with their crops, the same number for each
    progress: wraps the iteration over images, for example in a progress bar
    Raises UserError if no image can be read.
    """
    moments: dict[Size, list[Tensor]] = {}
    rows: list[ImageRow] = []
    for batch in batches(work, batch_size, skipped, progress):
        moments.setdefault(batch[0].crop.size, []).append(moments_of(vae, batch))
        rows += [replace(row, pixels=EMPTY) for row in batch]
    if not moments:
        raise UserError(f"none of the images can be read: {skipped.summary()}")
    rows.sort(key=lambda row: row.place)  # batches of several sizes come in another order
    variants = len(work[0][1])
    return Encoded(
        in_order(
            {size: torch.cat(parts) for size, parts in moments.items()}, [row.crop.size for row in rows]
        ),
        [row.sample.caption for row in rows],
        torch.tensor([row.size for row in rows]),
        digest(rows),
        variants,
        repeats_of(row.sample for row in rows[::variants]),
    )


def digest(rows: Iterable[Any]) -> str:
    """Return a hash of images and captions in order. Each row has sha256 and sample."""
    total = hashlib.sha256()
    for row in rows:
        total.update(row.sha256 + row.sample.caption.encode())
        if row.sample.repeats != 1:
            total.update(f"\0{row.sample.repeats}".encode())
    return total.hexdigest()


def repeats_of(samples: Iterable[Sample]) -> tuple[int, ...]:
    """Return how often each image counts in a pass; () if all count once."""
    found = tuple(sample.repeats for sample in samples)
    return found if set(found) != {1} else ()


@torch.no_grad()
def moments_of(vae: Any, batch: Sequence[ImageRow]) -> Tensor:
    """Return the VAE's posterior of each row: (B, 2C, h, w) float32 on the CPU."""
    first = next(vae.parameters())
    images = torch.stack([row.pixels for row in batch]).to(first.device, first.dtype)
    return latents_of(vae).moments(vae, images).float().cpu()


def batches(
    work: Sequence[Work], size: int, skipped: Skipped, progress: Any = iter
) -> Iterator[list[ImageRow]]:
    """Yield all rows, `size` at once; several threads read ahead.

    Rows of one size are in order, and a batch is of one size: it comes when it is full, or at the end.
    """
    waiting: dict[Size, list[ImageRow]] = {}
    images = progress(_read_ahead(work, AHEAD * size, skipped))
    rows = (row for image in images for row in image or ())
    for place, row in enumerate(rows):
        batch = waiting.setdefault(row.crop.size, [])
        batch.append(replace(row, place=place))
        if len(batch) == size:
            yield waiting.pop(row.crop.size)
    yield from waiting.values()


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
        return [ImageRow(*cut(image, crop), sample, crop, sha256) for crop in crops]
    except UNREADABLE as error:
        return reason(error)
