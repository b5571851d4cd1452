"""The training set from a cache: what is missing is encoded first, by all processes together."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from afa.errors import UserError
from afa.training.cache import LatentCache, check_space, row_key
from afa.training.data import Encoded, Work, batches, digest, moments_of
from afa.training.sources.base import BROKEN, Sample, Skipped
from afa.training.store import StoredRows


@dataclass(frozen=True)
class Found:
    """An image of the cache, in the place of a row."""

    sample: Sample
    sha256: bytes


def encode_cached(work: Sequence[Work], vae: Any, batch_size: int, skipped: Skipped, progress: Any = iter, *, cache: LatentCache) -> Encoded:
    """As data.encode, but only what the cache lacks is read and encoded; each process does its share."""
    state = PartialState()
    todo = [item for item in work if cache.find(*item) is None]
    state.wait_for_everyone()  # nobody writes before everybody has looked
    left_out = Skipped()
    for batch in batches(todo[state.process_index :: state.num_processes], batch_size, left_out, progress):
        keys = [row_key(row.sha256.hex(), row.crop) for row in batch]
        cache.add(keys, moments_of(vae, batch), [row.size for row in batch])
        cache.note((row.sample, row.sha256) for row in batch)
    state.wait_for_everyone()
    cache.refresh()
    reasons = {name: reason for reason, names in left_out.names.items() for name in names}
    return _collect(work, skipped, reasons, cache)


def _collect(work: Sequence[Work], skipped: Skipped, reasons: Mapping[str, str], cache: LatentCache) -> Encoded:
    """Everything in its order; what is still not there could not be read. reasons: why, where this process knows."""
    keys: list[str] = []
    images: list[Found] = []
    for sample, crops in work:
        known = cache.find(sample, crops)
        if known is None:
            skipped.add(reasons.get(sample.name, BROKEN), sample.name)
            continue
        keys += known.keys
        images += [Found(sample, known.sha256)] * len(crops)
    if not keys:
        raise UserError(f"none of the images can be read: {skipped.summary()}")
    captions = [image.sample.caption for image in images]
    return Encoded(StoredRows(cache.moments, keys), captions, cache.sizes.read(keys), digest(images), len(work[0][1]))


def announce(folder: Path, what: str, count: int, row_bytes: int) -> None:
    """Say what will be written, before it is. Raises UserError if the disk has no room for it."""
    if count:
        check_space(folder, count * row_bytes)
        if PartialState().is_main_process:
            print(f"afa: {count} {what} to put into the cache {folder}, {count * row_bytes / 1e6:,.1f} MB", file=sys.stderr)


def missing_rows(work: Iterable[Work], cache: LatentCache) -> int:
    """How many rows are not there yet."""
    return sum(len(crops) for sample, crops in work if cache.find(sample, crops) is None)
