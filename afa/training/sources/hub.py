"""Data sets of the Hugging Face hub, by their id: org/name@revision."""

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from afa.errors import UserError
from afa.text_files import TextError
from afa.training.sources.base import NO_FILE, Columns, LeftOutError, Sample, Skipped, Source, find_file
from afa.training.sources.parquet import image_bytes, row_caption

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
    samples, skipped, find = [], Skipped(), _finder(columns)
    for row, value in enumerate(table[caption]):
        label, mark = f"{name}:{row}", f"{table._fingerprint}-{row}"
        try:
            samples.append(Sample(label, row_caption(lambda value=value: value), mark, functools.partial(_read, table, image, row, find)))
        except LeftOutError as reason:
            skipped.add(str(reason), label)
    return Source(spec, samples, skipped)


def _finder(columns: Columns) -> Callable[[str], Path]:
    """Of the images that a data set names by path: they must lie where the hub's downloads are kept."""
    import datasets
    from huggingface_hub import constants

    kept = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    roots = None if columns.allow_outside else [Path(folder).resolve() for folder in kept]
    return functools.partial(find_file, folder=Path(), roots=roots)


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


def _read(table: Any, column: str, row: int, find: Callable[[str], Path]) -> bytes:
    return image_bytes(table[row][column], find)


def _streamed(spec: str, table: Any, columns: Columns, limit: int) -> Source:
    """The first rows, their images as they came in one temporary file; it is gone with the process."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the samples)
    samples, skipped, chosen, find = [], Skipped(), None, _finder(columns)
    for row, entry in enumerate(_rows(spec, table, limit)):
        image, caption = chosen = chosen or columns.choose(entry, f"data set {spec}")
        label = f"{spec}:{row}"
        try:
            text, data = row_caption(lambda value=entry[caption]: value), image_bytes(entry[image], find)
        except (OSError, TextError) as reason:
            skipped.add(str(reason) if isinstance(reason, LeftOutError) else NO_FILE, label)
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
