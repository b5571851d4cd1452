"""Data sets of the Hugging Face hub, by their id: org/name@revision."""

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from afa.errors import UserError
from afa.training.sources.base import NO_CAPTION, NO_FILE, Columns, Sample, Skipped, Source, caption_of
from afa.training.sources.parquet import image_bytes

SPLIT = "train"


def from_hub(spec: str, columns: Columns, limit: int | None = None) -> Source:
    """Downloaded once into the hub's cache and read from there; with a limit, only the first so many rows are, streamed.

    Raises UserError if it cannot be had.
    """
    name, _, revision = spec.partition("@")
    if limit is not None:
        return _streamed(spec, _load(name, revision or None, streaming=True), columns, limit)
    table = _load(name, revision or None)
    image, caption = columns.choose(table.column_names, f"data set {spec}")
    samples, skipped = [], Skipped()
    for row, value in enumerate(table[caption]):
        text = caption_of(value)
        if text:
            samples.append(Sample(f"{name}:{row}", text, f"{table._fingerprint}-{row}", functools.partial(_read, table, image, row)))
        else:
            skipped.add(NO_CAPTION, f"{name}:{row}")
    return Source(spec, samples, skipped)


def _load(name: str, revision: str | None, streaming: bool = False) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"--data {name} is no file or folder, and data sets of the hub need: pip install 'afa[data]'") from None
    try:
        table = datasets.load_dataset(name, revision=revision, split=SPLIT, streaming=streaming)
    except Exception as error:  # of many kinds: no network, no such set, no such split, a script in it
        raise UserError(f"--data {name} is no file or folder, and cannot be loaded from the hub: {str(error).splitlines()[0]}") from None
    for column, kind in (table.features or {}).items():
        if isinstance(kind, datasets.Image):  # decoded by us, so that one broken image stops nothing
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _read(table: Any, column: str, row: int) -> bytes:
    return image_bytes(table[row][column], Path())


def _streamed(spec: str, table: Any, columns: Columns, limit: int) -> Source:
    """The first rows, their images as they came in one temporary file; it is gone with the process."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the samples)
    samples, skipped, chosen = [], Skipped(), None
    for row, entry in enumerate(_rows(spec, table, limit)):
        image, caption = chosen = chosen or columns.choose(entry, f"data set {spec}")
        text, label = caption_of(entry[caption]), f"{spec}:{row}"
        if not text:
            skipped.add(NO_CAPTION, label)
            continue
        try:
            data = image_bytes(entry[image], Path())
        except OSError:
            skipped.add(NO_FILE, label)
            continue
        place = spool.seek(0, os.SEEK_END)
        spool.write(data)
        samples.append(Sample(label, text, f"sha256 {hashlib.sha256(data).hexdigest()}", functools.partial(_part, spool, place, len(data))))
    spool.flush()
    return Source(spec, samples, skipped)


def _rows(spec: str, table: Any, limit: int) -> Iterator[dict[str, Any]]:
    """With a bar. Raises UserError where the stream breaks."""
    rows = iter(tqdm(table.take(limit), desc="streaming images", unit="image", total=limit, file=sys.stderr))
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except Exception as error:  # of the network, of a reader
            raise UserError(f"--data {spec} could not be streamed to its {limit} rows: {str(error).splitlines()[0]}; run the same command again") from None


def _part(spool: IO[bytes], place: int, size: int) -> bytes:
    return os.pread(spool.fileno(), size, place)  # several threads read
