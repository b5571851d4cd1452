"""Parquet files: captions in one column, images in another, as bytes or as paths."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.training.sources.base import NO_CAPTION, Columns, Sample, Skipped, Source, caption_of, file_mark


def from_parquet(origin: str, files: Sequence[Path], columns: Columns) -> Source:
    """Only captions are read here; images by row group, the last one kept, so neighbours cost one read.

    An image is a column of bytes, of {"bytes", "path"} (as `datasets` writes it), or of paths relative to the file.
    Raises UserError for a file that is no parquet, or has no such columns.
    """
    samples, skipped = [], Skipped()
    for file in files:
        opened = _open(file)
        image, caption = columns.choose(opened.schema_arrow.names, str(file))
        mark = file_mark(file)
        row = 0
        for group in range(opened.num_row_groups):
            for place, value in enumerate(opened.read_row_group(group, columns=[caption]).column(0).to_pylist()):
                name, text = f"{file.name}:{row}", caption_of(value)
                row += 1
                if text:
                    samples.append(Sample(name, text, f"{mark} {row}", functools.partial(_read, file, image, group, place)))
                else:
                    skipped.add(NO_CAPTION, name)
    return Source(origin, samples, skipped)


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it with: pip install 'afa[data]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise UserError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _read(file: Path, column: str, group: int, place: int) -> bytes:
    return image_bytes(_images(file, column, group)[place].as_py(), file.parent)


@functools.lru_cache(maxsize=2)
def _images(file: Path, column: str, group: int) -> Any:
    return _open(file).read_row_group(group, columns=[column]).column(0)


def image_bytes(value: Any, folder: Path) -> bytes:
    """An image as a table holds it. Raises OSError where there is none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return (folder / value).read_bytes()
    raise OSError(f"there is no image, but {value!r}")
