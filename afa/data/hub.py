"""Captioned images from parquet files and from data sets of the hub."""

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from afa.data.sources import (
    NO_CAPTION,
    NO_FILE,
    NO_IMAGE,
    Columns,
    LeftOutError,
    Sample,
    Skipped,
    caption_of,
    file_mark,
    find_file,
    roots_of,
)
from afa.errors import UserError
from afa.hub_files import answering_hub
from afa.text_files import TextError, read_bytes

# What pyarrow raises for a damaged file; its own errors are among them.
PARQUET_ERRORS = (OSError, ValueError, NotImplementedError, TypeError, KeyError, MemoryError)


def from_parquet(files: Iterable[Path], columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Read the images of parquet files; only captions are read here.

    Images are read by row group, and the last group is kept, so that neighbours need one read. An image is a
    column of bytes, of {"bytes", "path"} (as `datasets` writes it), or of paths relative to the file.
    Raises UserError for a file that is not parquet, or has no such columns.
    """
    for file in files:
        opened = open_parquet(file)
        image, caption = columns.choose(opened.schema_arrow.names, str(file))
        find = functools.partial(find_file, folder=file.parent, roots=roots_of(file.parent, columns))
        mark, row = file_mark(file), 0
        for group in range(opened.num_row_groups):
            for place, value in enumerate(_column(file, opened, group, caption)):
                name = f"{file.name}:{row}"
                row += 1
                with skipped.noting(name):
                    read = functools.partial(read_parquet, file, image, group, place, find)
                    yield Sample(name, _needed(value.as_py()), f"{mark} {row}", read)


def _needed(value: Any) -> str:
    """The caption of a row. Raises LeftOutError if there is none, TextError if it is not text."""
    text = caption_of(value)
    if not text:
        raise LeftOutError(NO_CAPTION)
    return text


def image_bytes(value: Any, find: Callable[[str], Path]) -> bytes:
    """The bytes of an image from a value in a table.

    find: returns the file of a path; see find_file
    Raises OSError if there is no image.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return read_bytes(find(value))
    raise LeftOutError(NO_IMAGE)


def open_parquet(file: Path) -> Any:
    """Open a parquet file. Raises UserError if it is none, or pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it with: pip install 'afa[data]'") from None
    return _reading(file, lambda: pyarrow.parquet.ParquetFile(file))


def _reading(file: Path, read: Callable[[], Any]) -> Any:
    """What a reader of pyarrow returns. Raises UserError if it fails."""
    try:
        return read()
    except PARQUET_ERRORS as error:
        why = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{file} cannot be read as parquet: {why[0][:200]}") from None


def _column(file: Path, opened: Any, group: int, name: str) -> Any:
    return _reading(file, lambda: opened.read_row_group(group, columns=[name]).column(0))


def read_parquet(file: Path, column: str, group: int, place: int, find: Callable[[str], Path]) -> bytes:
    """Read the image of one row, counted in its row group; the group is kept. find: see image_bytes"""
    return image_bytes(_images(file, column, group)[place].as_py(), find)


@functools.lru_cache(maxsize=2)
def _images(file: Path, column: str, group: int) -> Any:
    return _column(file, open_parquet(file), group, column)


SPLIT = "train"


def from_hub(spec: str, columns: Columns, skipped: Skipped, limit: int | None = None) -> Iterator[Sample]:
    """Read the images of a data set of the hub, downloaded once into the hub's cache.

    limit: stream only the first so many rows; None: all
    Raises UserError if it cannot be downloaded.
    """
    name, _, revision = spec.partition("@")
    table = _load(name, revision or None, streaming=limit is not None)
    if limit is not None:
        yield from _streamed(spec, table, columns, skipped, limit)
        return
    image, caption = columns.choose(table.column_names, f"data set {spec}")
    find = _finder(columns)
    for row, value in enumerate(table[caption]):
        label = f"{name}:{row}"
        with skipped.noting(label):
            read = functools.partial(_read, table, image, row, find)
            yield Sample(label, _needed(value), f"{table._fingerprint}-{row}", read)


def _finder(columns: Columns) -> Callable[[str], Path]:
    """A finder of images that a data set names by path: they must lie in the hub's downloads."""
    from datasets import config
    from huggingface_hub import constants

    kept = (constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    roots = None if columns.allow_outside else [Path(folder).resolve() for folder in kept]
    return functools.partial(find_file, folder=Path(), roots=roots)


def _load(name: str, revision: str | None, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {name} is no file or folder, and data sets of the hub need: pip install 'afa[data]'"
        ) from None
    with answering_hub() as answers:
        try:
            table = datasets.load_dataset(name, revision=revision, split=SPLIT, streaming=streaming)
        except Exception as error:  # of many kinds: no network, no such set, no such split, a script in it
            silent = "" if answers else "it does not answer, or HF_HUB_OFFLINE is set; "
            raise UserError(
                f"--data {name} is no file or folder, and cannot be loaded from the hub: {silent}"
                f"{str(error).splitlines()[0]}"
            ) from None
    for column, kind in (table.features or {}).items():
        if isinstance(kind, datasets.Image):  # decoded by us, so that one broken image stops nothing
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _read(table: Any, column: str, row: int, find: Callable[[str], Path]) -> bytes:
    return image_bytes(table[row][column], find)


def _streamed(spec: str, table: Any, columns: Columns, skipped: Skipped, limit: int) -> Iterator[Sample]:
    """Read the first rows; their images lie in one temporary file that the process deletes at its end."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the samples)
    chosen, find = None, _finder(columns)
    for row, entry in enumerate(_rows(spec, table, limit)):
        image, caption = chosen = chosen or columns.choose(entry, f"data set {spec}")
        label = f"{spec}:{row}"
        with skipped.noting(label):
            text, data = _needed(entry[caption]), _downloaded(entry[image], find)
            place = spool.seek(0, os.SEEK_END)
            spool.write(data)
            spool.flush()
            read = functools.partial(_part, spool, place, len(data))
            yield Sample(label, text, f"sha256 {hashlib.sha256(data).hexdigest()}", read)


def _downloaded(value: Any, find: Callable[[str], Path]) -> bytes:
    """image_bytes() of a row that is streamed. Raises LeftOutError if its file cannot be read."""
    try:
        return image_bytes(value, find)
    except (OSError, TextError) as error:
        raise error if isinstance(error, LeftOutError) else LeftOutError(NO_FILE) from None


def _rows(spec: str, table: Any, limit: int) -> Iterator[dict[str, Any]]:
    """Yield rows with a progress bar. Raises UserError if the stream breaks."""
    rows = iter(tqdm(table.take(limit), desc="streaming images", unit="image", total=limit, file=sys.stderr))
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except Exception as error:  # of the network, of a reader
            raise UserError(
                f"--data {spec} could not be streamed to its {limit} rows: {str(error).splitlines()[0]}; "
                "run the same command again"
            ) from None


def _part(spool: IO[bytes], place: int, size: int) -> bytes:
    return os.pread(spool.fileno(), size, place)  # several threads read
