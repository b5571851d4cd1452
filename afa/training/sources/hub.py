"""Data sets of the Hugging Face hub, by their id: org/name@revision."""

import functools
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.training.sources.base import NO_CAPTION, Columns, Sample, Skipped, Source, caption_of
from afa.training.sources.parquet import image_bytes

SPLIT = "train"


def from_hub(spec: str, columns: Columns) -> Source:
    """Downloaded once into the hub's cache and read from there. Raises UserError if it cannot be had."""
    name, _, revision = spec.partition("@")
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


def _load(name: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"--data {name} is no file or folder, and data sets of the hub need: pip install 'afa[data]'") from None
    try:
        table = datasets.load_dataset(name, revision=revision, split=SPLIT)
    except Exception as error:  # of many kinds: no network, no such set, no such split, a script in it
        raise UserError(f"--data {name} is no file or folder, and cannot be loaded from the hub: {str(error).splitlines()[0]}") from None
    for column, kind in table.features.items():
        if isinstance(kind, datasets.Image):  # decoded by us, so that one broken image stops nothing
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _read(table: Any, column: str, row: int) -> bytes:
    return image_bytes(table[row][column], Path())
