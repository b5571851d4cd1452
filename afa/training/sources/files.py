"""Images that lie as files: a folder with a list of them, any JSONL of paths and captions, or captions in files beside."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from afa.errors import UserError
from afa.text_files import TextError, read_json_lines, read_text
from afa.training.sources.base import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_ENDINGS,
    LONGEST,
    NO_CAPTION,
    NO_IMAGE,
    NO_TEXT,
    Columns,
    LeftOutError,
    Sample,
    Skipped,
    Source,
    caption_in_json,
    caption_of,
    file_sample,
    find_file,
    first_known,
    is_hidden,
    roots_of,
)

METADATA, TABLE = "metadata.jsonl", "metadata.csv"


def from_jsonl(file: Path, columns: Columns) -> Source:
    """One image a line: {"file_name": …, "text": …}; paths are relative to the file.

    Raises UserError for a line that is no JSON, or names no image.
    """
    samples: list[Sample] = []
    skipped = Skipped()
    for place, entry in read_json_lines(file):
        if not isinstance(entry, dict):
            raise UserError(f'{place} is no object; expected {{"file_name": "a.png", "text": "caption"}}')
        named = first_known(entry, columns.image, IMAGE_COLUMNS)
        if not isinstance(named, str):
            wanted = columns.image or "file_name"
            raise UserError(f'{place} has no "{wanted}"; expected {{"{wanted}": "a.png", "text": "caption"}}')
        caption = caption_of(first_known(entry, columns.caption, CAPTION_COLUMNS))
        _add(samples, skipped, named, caption, file.parent, columns)
    return Source(str(file), samples, skipped)


def from_csv(file: Path, columns: Columns) -> Source:
    """One image a row, below a row of names. Raises UserError for a table without columns of image and caption."""
    table = csv.DictReader(io.StringIO(read_text(file), newline=""))
    samples: list[Sample] = []
    skipped = Skipped()
    try:
        image, caption = columns.choose(table.fieldnames or [], str(file))
        for row in table:
            _add(samples, skipped, row[image] or "", caption_of(row[caption]), file.parent, columns)
    except csv.Error as error:
        raise UserError(f"{file}, line {table.line_num} cannot be read as CSV: {error}") from None
    return Source(str(file), samples, skipped)


def from_pairs(folder: Path, columns: Columns) -> Source | None:
    """Images with captions beside them in files of the same name (a.png, a.txt), also in folders inside.

    A caption is all of a .txt, .caption or .text, or what a .json says; the first that says something is taken.
    Returns None if no image has such a file.
    """
    groups: dict[str, dict[str, str]] = {}  # path without its ending -> ending -> path
    for name in _visible(folder):
        groups.setdefault(str(PurePosixPath(name).with_suffix("")), {})[PurePosixPath(name).suffix[1:].lower()] = name
    captions = (*([columns.caption] if columns.caption else CAPTION_COLUMNS), "json")
    pictures = (columns.image,) if columns.image else IMAGE_ENDINGS
    samples: list[Sample] = []
    skipped, found = Skipped(), False
    for beside in groups.values():
        texts = [beside[ending] for ending in captions if ending in beside]
        images = [name for ending, name in beside.items() if ending in pictures]
        found = found or bool(texts and images)
        if texts and not images:  # a caption alone is no image; one beside something else has an image of another kind
            for name in (name for ending, name in beside.items() if ending not in (*captions, *CAPTION_COLUMNS)):
                skipped.add(NO_IMAGE, name)
        for name in images:
            try:
                caption = next(filter(None, (_caption(folder, text, columns) for text in texts)), "")
                _add(samples, skipped, name, caption, folder, columns)
            except LeftOutError as reason:
                skipped.add(str(reason), name)
    return Source(str(folder), samples, skipped) if found else None


def _add(samples: list[Sample], skipped: Skipped, named: str, caption: str, folder: Path, columns: Columns) -> None:
    """One more image, or why it is left out."""
    try:
        if not caption:
            raise LeftOutError(NO_CAPTION)
        samples.append(file_sample(named, caption, find_file(named, folder, roots_of(folder, columns))))
    except LeftOutError as reason:
        skipped.add(str(reason), named)


def _visible(folder: Path) -> Iterator[str]:
    """The paths of all files below a folder, in order, but of those that macOS and others hide there."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not is_hidden(name.as_posix()) and not path.is_dir():
            yield name.as_posix()


def _caption(folder: Path, name: str, columns: Columns) -> str:
    """What a file beside an image says, "" if nothing. Raises LeftOutError for what is no text."""
    try:
        text = read_text(find_file(name, folder, roots_of(folder, columns)), LONGEST)
    except TextError:
        raise LeftOutError(NO_TEXT) from None
    return caption_in_json(text, columns.caption) if name.lower().endswith(".json") else caption_of(text)
