"""Parquet files: captions in one column, images in another, as bytes or as paths."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.text_files import TextError, read_bytes
from afa.training.sources.base import (
    NO_CAPTION,
    NO_IMAGE,
    NO_TEXT,
    Columns,
    LeftOutError,
    Sample,
    Skipped,
    Source,
    caption_of,
    file_mark,
    find_file,
    roots_of,
)


def from_parquet(origin: str, files: Sequence[Path], columns: Columns) -> Source:
    """Only captions are read here; images by row group, the last one kept, so neighbours cost one read.

    An image is a column of bytes, of {"bytes", "path"} (as `datasets` writes it), or of paths relative to the file.
    Raises UserError for a file that is no parquet, or has no such columns.
    """
    samples, skipped = [], Skipped()
    for file in files:
        opened = _open(file)
        image, caption = columns.choose(opened.schema_arrow.names, str(file))
        mark, find = file_mark(file), functools.partial(find_file, folder=file.parent, roots=roots_of(file.parent, columns))
        row = 0
        for group in range(opened.num_row_groups):
            for place, value in enumerate(_column(file, opened, group, caption)):
                name = f"{file.name}:{row}"
                row += 1
                try:
                    text = row_caption(value.as_py)
                    read = functools.partial(_read, file, image, group, place, find)
                    samples.append(Sample(name, text, f"{mark} {row}", read))
                except LeftOutError as reason:
                    skipped.add(str(reason), name)
    return Source(origin, samples, skipped)


def row_caption(value: Callable[[], Any]) -> str:
    """The caption of a row. Raises LeftOutError where there is none, or it is no text."""
    try:
        text = caption_of(value())
    except (TextError, UnicodeDecodeError):
        raise LeftOutError(NO_TEXT) from None
    if not text:
        raise LeftOutError(NO_CAPTION)
    return text


def image_bytes(value: Any, find: Callable[[str], Path]) -> bytes:
    """An image as a table holds it. find: the file of a path, as find_file. Raises OSError where there is none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return read_bytes(find(value))
    raise LeftOutError(NO_IMAGE)


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it with: pip install 'afa[data]'") from None
    return _reading(file, lambda: pyarrow.parquet.ParquetFile(file))


def _reading(file: Path, read: Callable[[], Any]) -> Any:
    """What a reader of pyarrow gives. Raises UserError where it cannot."""
    try:
        return read()
    except (OSError, ValueError, NotImplementedError, TypeError, KeyError, MemoryError) as error:  # pyarrow's are among them
        why = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{file} cannot be read as parquet: {why[0][:200]}") from None


def _column(file: Path, opened: Any, group: int, name: str) -> Any:
    return _reading(file, lambda: opened.read_row_group(group, columns=[name]).column(0))


def _read(file: Path, column: str, group: int, place: int, find: Callable[[str], Path]) -> bytes:
    return image_bytes(_images(file, column, group)[place].as_py(), find)


@functools.lru_cache(maxsize=2)
def _images(file: Path, column: str, group: int) -> Any:
    return _column(file, _open(file), group, column)
