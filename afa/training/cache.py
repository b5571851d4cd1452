"""A cache on disk of encoded training data, shared by runs: latents of images and text states of captions."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor, nn

from afa.data.buckets import Size
from afa.data.images import Crop
from afa.data.sources import BROKEN, Sample, Skipped
from afa.errors import UserError
from afa.images import OPENER
from afa.latents import latents_of
from afa.store import RowStore, StoredRows
from afa.training.data import Encoded, ImageRow, Work, batches, digest, in_order, moments_of, repeats_of

MARKS = "images.txt"  # what is known of images without reading them
SIZES = 6
MARK = re.compile("[0-9a-f]{64} [0-9a-f]{64}")  # a line of that file


def content_hash(*modules: nn.Module) -> str:
    """Return a hash of all that decides what models compute: class, config and weights."""
    total = hashlib.sha256()
    for module in modules:
        config = getattr(module, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        total.update(f"{type(module).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name} {tensor.dtype}".encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class Known:
    """An image that need not be read again.

    sha256: of its bytes
    keys:   of its rows in the cache
    """

    sha256: bytes
    keys: list[str]


class SizeRows(NamedTuple):
    """What a cache keeps of all crops of one size: the VAE's moments, and the size conditions."""

    moments: RowStore
    sizes: RowStore


class LatentCache:
    """The VAE's moments and the size conditions of images, by image content, crop and VAE.

    The rows of each size have a folder of their own.
    """

    def __init__(self, folder: Path, vae: nn.Module) -> None:
        self._place, self._vae = folder / f"latents-{content_hash(vae)[:16]}", vae
        self._stores: dict[Size, SizeRows] = {}
        self._marks_file = folder / MARKS
        self._marks = dict(line.split() for line in _lines(self._marks_file))

    def rows(self, size: Size) -> SizeRows:
        """Return the rows of all crops of a size, height and width in pixels."""
        if size not in self._stores:
            latents = latents_of(self._vae)
            height, width = (side // latents.factor for side in size)
            shape = (2 * latents.channels, height, width)
            name = "x".join(map(str, shape))
            self._stores[size] = SizeRows(
                RowStore(self._place / "moments" / name, shape, torch.float32),
                RowStore(self._place / "sizes" / name, (SIZES,), torch.float32),
            )
        return self._stores[size]

    def find(self, sample: Sample, crops: Sequence[Crop]) -> Known | None:
        """Return what is known of an image and its crops.

        Returns None if a crop is missing, or the image may have changed.
        """
        image = self._marks.get(_mark(sample))
        if image is None:
            return None
        keys = [row_key(image, crop) for crop in crops]
        there = all(
            key in store for key, crop in zip(keys, crops, strict=True) for store in self.rows(crop.size)
        )
        return Known(bytes.fromhex(image), keys) if there else None

    def add(self, keys: Sequence[str], moments: Tensor, rows: Sequence[ImageRow]) -> None:
        """Store the rows of a batch, which is of one size."""
        stores = self.rows(rows[0].crop.size)
        stores.sizes.add(keys, torch.tensor([row.size for row in rows]))
        stores.moments.add(keys, moments)

    def note(self, images: Iterable[tuple[Sample, bytes]]) -> None:
        """Store the hashes of images, so that they are not read again until they change."""
        fresh = {_mark(sample): sha256.hex() for sample, sha256 in images}
        fresh = {mark: image for mark, image in fresh.items() if self._marks.get(mark) != image}
        if fresh:
            with self._marks_file.open("a") as file:
                file.write("".join(f"{mark} {image}\n" for mark, image in fresh.items()))
            self._marks |= fresh

    def refresh(self) -> None:
        """Read what other processes have added."""
        for store in (store for stores in self._stores.values() for store in stores):
            store.refresh()
        self._marks = dict(line.split() for line in _lines(self._marks_file))


class TextCache:
    """The text states of captions, by caption and text encoders.

    parts: shape (without the batch) and dtype of each stored tensor
    """

    def __init__(
        self, folder: Path, identity: str, parts: Sequence[tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        place = folder / f"text-{identity[:16]}"
        self.stores = [
            RowStore(place / f"part-{index}", shape, dtype) for index, (shape, dtype) in enumerate(parts)
        ]

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Return the captions that are not stored, each once."""
        return [
            caption
            for caption in dict.fromkeys(captions)
            if any(caption_key(caption) not in store for store in self.stores)
        ]

    def add(self, captions: Sequence[str], parts: Sequence[Tensor]) -> None:
        for store, part in zip(self.stores, parts, strict=True):
            store.add([caption_key(caption) for caption in captions], part)

    def read(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(store.read([caption_key(caption) for caption in captions]) for store in self.stores)

    def refresh(self) -> None:
        for store in self.stores:
            store.refresh()

    @property
    def row_bytes(self) -> int:
        return sum(store.row_bytes for store in self.stores)


def row_key(image: str, crop: Crop) -> str:
    """Return a key of an image's content, its decoder and its crop."""
    height, width = crop.size
    size = height if height == width else f"{height}x{width}"
    facts = f"{image} {size} {crop.place} {crop.flip} {OPENER}"
    return hashlib.sha256(facts.encode()).hexdigest()


def caption_key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if the folder's disk has less space than needed, in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--cache {folder} needs {needed / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB left; "
            "give another place"
        )


def _mark(sample: Sample) -> str:
    return hashlib.sha256(sample.mark.encode(errors="surrogateescape")).hexdigest()  # a path may be no UTF-8


def _lines(file: Path) -> list[str]:
    """Return the whole lines of a file; a line that was cut off is ignored."""
    text = file.read_text(encoding="ascii", errors="replace") if file.exists() else ""
    return [line for line in text[: text.rfind("\n") + 1].split("\n") if MARK.fullmatch(line)]


@dataclass(frozen=True)
class CachedImage:
    """A cached image; it takes the place of data.ImageRow."""

    sample: Sample
    sha256: bytes


def encode_cached(
    work: Sequence[Work],
    vae: Any,
    batch_size: int,
    skipped: Skipped,
    progress: Any = iter,
    *,
    cache: LatentCache,
) -> Encoded:
    """Encode like data.encode, but only what the cache lacks; each process does its share."""
    state = PartialState()
    todo = [item for item in work if cache.find(*item) is None]
    state.wait_for_everyone()  # all processes look before one writes
    left_out = Skipped()
    for batch in batches(todo[state.process_index :: state.num_processes], batch_size, left_out, progress):
        keys = [row_key(row.sha256.hex(), row.crop) for row in batch]
        cache.add(keys, moments_of(vae, batch), batch)
        cache.note((row.sample, row.sha256) for row in batch)
    state.wait_for_everyone()
    cache.refresh()
    reasons = {name: reason for reason, names in left_out.names.items() for name in names}
    return _collect(work, skipped, reasons, cache)


def _collect(
    work: Sequence[Work], skipped: Skipped, reasons: Mapping[str, str], cache: LatentCache
) -> Encoded:
    """Collect all rows in order. An image that is still missing could not be read.

    reasons: why, by image name, for the images that this process read
    """
    keys: dict[Size, list[str]] = {}
    sizes: list[Size] = []
    images: list[CachedImage] = []
    for sample, crops in work:
        known = cache.find(sample, crops)
        if known is None:
            skipped.add(reasons.get(sample.name, BROKEN), sample.name)
            continue
        keys.setdefault(crops[0].size, []).extend(known.keys)
        sizes += [crop.size for crop in crops]
        images += [CachedImage(sample, known.sha256)] * len(crops)
    if not keys:
        raise UserError(f"none of the images can be read: {skipped.summary()}")
    captions, variants = [image.sample.caption for image in images], len(work[0][1])
    stores = {size: cache.rows(size) for size in keys}
    moments = in_order({size: StoredRows(stores[size].moments, keys[size]) for size in keys}, sizes)
    conditions = in_order({size: stores[size].sizes.read(keys[size]) for size in keys}, sizes)
    return Encoded(
        moments,
        captions,
        conditions[:] if len(stores) == 1 else torch.cat([conditions[[row]] for row in range(len(sizes))]),
        digest(images),
        variants,
        repeats_of(image.sample for image in images[::variants]),
    )


def announce(folder: Path, what: str, row_bytes: Sequence[int]) -> None:
    """Print what will be written. Raises UserError if the disk has no room for it.

    row_bytes: of each row
    """
    if row_bytes:
        check_space(folder, sum(row_bytes))
        if PartialState().is_main_process:
            print(
                f"afa: {len(row_bytes)} {what} to put into the cache {folder}, "
                f"{sum(row_bytes) / 1e6:,.1f} MB",
                file=sys.stderr,
            )


def missing_rows(work: Iterable[Work], cache: LatentCache) -> list[SizeRows]:
    """Return where each row that the cache lacks will be."""
    lacking = (crops for sample, crops in work if cache.find(sample, crops) is None)
    return [cache.rows(crop.size) for crops in lacking for crop in crops]


STEP = 16  # tokens: rows are as long as the next multiple


class VaryingTextCache:
    """Text states of variable length, by caption and text encoders; the same interface as TextCache.

    States are (T, D), or (T, L, D) of L layers, with a mask (T,) that is True for the first tokens.
    shape:   of a token's states: (D,) or (L, D)
    longest: tokens of the longest caption, to estimate the cache's size
    """

    def __init__(
        self, folder: Path, identity: str, shape: Sequence[int], dtype: torch.dtype, longest: int
    ) -> None:
        self.place, self.shape, self.dtype = folder / f"text-{identity[:16]}", tuple(shape), dtype
        self.row_bytes = _row(longest) * prod(self.shape) * dtype.itemsize + 8
        self.lengths = RowStore(self.place / "lengths", (1,), torch.int64)
        self.stores: dict[int, RowStore] = {}
        self.refresh()

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Return the captions that are not stored, each once."""
        return [caption for caption in dict.fromkeys(captions) if caption_key(caption) not in self.lengths]

    def add(self, captions: Sequence[str], parts: Sequence[Tensor]) -> None:
        """Store states (B, T, …) and their mask (B, T).

        States are written before lengths, so that a length never stands without its states.
        """
        states, mask = parts
        keys, lengths = [caption_key(caption) for caption in captions], mask.sum(1).tolist()
        assert all(bool(kept[:length].all()) for kept, length in zip(mask, lengths, strict=True)), (
            "padding stands behind a prompt"
        )
        for size in sorted({_row(length) for length in lengths}):
            chosen = [place for place, length in enumerate(lengths) if _row(length) == size]
            rows = states.new_zeros(len(chosen), size, *self.shape)
            for row, place in zip(rows, chosen, strict=True):
                row[: lengths[place]] = states[place, : lengths[place]]
            self._store(size).add([keys[place] for place in chosen], rows)
        self.lengths.add(keys, torch.tensor(lengths).view(-1, 1))

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return states (B, T, …), zero after the end of each prompt, and their mask (B, T).

        T: of the longest.
        """
        keys = [caption_key(caption) for caption in captions]
        lengths = self.lengths.read(keys)  # (B, 1)
        states = torch.zeros(len(keys), int(lengths.max()), *self.shape, dtype=self.dtype)
        for own, key, length in zip(states, keys, lengths.flatten().tolist(), strict=True):
            own[:length] = self._store(_row(length)).read([key])[0, :length]
        return states, torch.arange(states.shape[1])[None] < lengths

    def refresh(self) -> None:
        """Read what other processes have added."""
        for folder in self.place.glob("states-*"):
            self._store(int(folder.name.removeprefix("states-")))
        for store in self.stores.values():
            store.refresh()
        self.lengths.refresh()

    def _store(self, length: int) -> RowStore:
        if length not in self.stores:
            self.stores[length] = RowStore(self.place / f"states-{length}", (length, *self.shape), self.dtype)
        return self.stores[length]


def _row(length: int) -> int:
    """Round a prompt's length up to that of its row."""
    return -(-length // STEP) * STEP
