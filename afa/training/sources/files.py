"""Images that lie as files: a folder with metadata.jsonl, or any JSONL of paths and captions."""

import json
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.training.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    NO_CAPTION,
    NO_FILE,
    Columns,
    Sample,
    Skipped,
    Source,
    caption_of,
    file_mark,
    first_known,
)

METADATA = "metadata.jsonl"


def from_folder(folder: Path, columns: Columns) -> Source:
    """A folder of images with metadata.jsonl: {"file_name": …, "text": …} a line, as `datasets` reads it."""
    return from_jsonl(folder / METADATA, columns)


def from_jsonl(file: Path, columns: Columns) -> Source:
    """One image a line; paths are relative to the file. Raises UserError for a line that is no JSON, or names no image."""
    samples, skipped = [], Skipped()
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            entry = _entry(line, file, number)
            named = first_known(entry, columns.image, IMAGE_COLUMNS)
            if not isinstance(named, str):
                wanted = columns.image or "file_name"
                raise UserError(f'{file}, line {number} has no "{wanted}"; expected {{"{wanted}": "a.png", "text": "caption"}}')
            path, caption = file.parent / named, caption_of(first_known(entry, columns.caption, CAPTION_COLUMNS))
            if not caption:
                skipped.add(NO_CAPTION, named)
            elif not path.is_file():
                skipped.add(NO_FILE, named)
            else:
                samples.append(Sample(named, caption, file_mark(path), path.read_bytes))
    return Source(str(file), samples, skipped)


def _entry(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}, line {number} is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(f'{file}, line {number} is no object; expected {{"file_name": "a.png", "text": "caption"}}')
    return entry

