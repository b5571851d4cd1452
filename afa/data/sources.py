"""Captioned images from folders and lists, and a record of images that are left out.

A reader yields the samples of a data set, and notes in a `Skipped` which images it leaves out, and why.
"""

import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.files import write_atomically
from afa.text_files import TextError, check_text, clean, parse_json, read_bytes, read_json_lines, read_text

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "file_name", "path", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "jp2")
LONGEST = 2**20  # bytes of a caption
# Why an image is left out.
NO_CAPTION, NO_FILE, BROKEN = "no caption", "no such file", "not readable as an image"
NO_IMAGE, NO_TEXT, NOT_PLAIN = "no image", "its caption is no UTF-8 text", "not a plain file"
OUTSIDE = "outside the data's folder, which needs --allow-outside"


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned image.

    name:    shown to people, unique in its data set
    caption: its text
    mark:    identifies the image and its version: it changes when the file changes
    read:    returns the encoded image; raises OSError or UserError if it cannot be read
    """

    name: str
    caption: str
    mark: str
    read: Callable[[], bytes]


def file_mark(file: Path) -> str:
    """Return a mark of a file's path, size and time of change, without reading it."""
    facts = file.stat()
    return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"


class LeftOutError(OSError):
    """An image that is not used. Its text is one of the reasons above."""


@dataclass
class Skipped:
    """The names of images that are left out, by reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Note one image."""
        self.names.setdefault(reason, []).append(name)

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Note an image if the body raises LeftOutError, or finds that the caption is not text."""
        try:
            yield
        except LeftOutError as reason:
            self.add(str(reason), name)
        except (TextError, UnicodeDecodeError):
            self.add(NO_TEXT, name)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def counts(self) -> dict[str, int]:
        """The number of images by reason."""
        return {reason: len(names) for reason, names in self.names.items()}

    def write(self, file: Path) -> None:
        """Write a line of JSON per image with its reason and name; no file if nothing is left out."""
        lines = [
            json.dumps({"reason": reason, "image": name})
            for reason, names in self.names.items()
            for name in names
        ]
        if lines:
            write_atomically(file, "\n".join(lines) + "\n")

    def summary(self) -> str:
        """Return one clause per reason; empty if nothing is left out."""
        return "; ".join(
            f"{len(names)} left out: {why} ({names[0]}{', …' if len(names) > 1 else ''})"
            for why, names in self.names.items()
        )


@dataclass
class ImageSource:
    """A listed data set.

    origin:  the place that the user gave
    samples: its images
    skipped: the images that are left out
    """

    origin: str
    samples: Sequence[Sample]
    skipped: Skipped = field(default_factory=Skipped)

    def __post_init__(self) -> None:
        self.listed = len(self.samples) + len(self.skipped)  # before any image is read

    def summary(self) -> str:
        """One line: how many images there are, and what was left out."""
        return "; ".join(filter(None, (f"{len(self.samples)} captioned images", self.skipped.summary())))


@dataclass(frozen=True)
class Columns:
    """How data are read.

    image, caption: names of the columns; None: the first usual name that the data have
    allow_outside:  whether images may lie outside the data's folder
    """

    image: str | None = None
    caption: str | None = None
    allow_outside: bool = False

    def choose(self, names: Iterable[str], what: str) -> tuple[str, str]:
        """Return the names of the image's and the caption's column. Raises UserError if one is missing."""
        known = list(names)
        image = _one(self.image, IMAGE_COLUMNS, known, "image", what)
        return image, _one(self.caption, CAPTION_COLUMNS, known, "caption", what)


def _one(asked: str | None, usual: Sequence[str], known: list[str], kind: str, what: str) -> str:
    found = next((name for name in ([asked] if asked else usual) if name in known), None)
    if found is None:
        lack = f"has no '{asked}'" if asked else f"has none of {', '.join(usual)}"
        raise UserError(
            f"{what} {lack} for the {kind}, only {', '.join(known) or 'nothing'}; "
            f"say which with --{kind}-column"
        )
    return found


def caption_of(value: Any) -> str:
    """Return a caption without surrounding blanks; "" if there is none; of a list the first one with text.

    Raises TextError for a string that is not valid text.
    """
    if isinstance(value, (list, tuple)):
        return next((caption for caption in map(caption_of, value) if caption), "")
    return clean(check_text(value, "a caption")) if isinstance(value, str) else ""


def caption_in_json(text: str, asked: str | None) -> str:
    """Return the caption in a JSON text; "" if there is none.

    asked: its key; None: the usual keys
    """
    try:
        entry = parse_json(text, "a caption")
    except TextError:
        return ""
    return caption_of(first_known(entry, asked, CAPTION_COLUMNS)) if isinstance(entry, dict) else ""


def is_hidden(name: str) -> bool:
    """Return whether a path is of a hidden file, such as .DS_Store, ._a.png or __MACOSX/…"""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def first_known(entry: Mapping[str, Any], asked: str | None, usual: Sequence[str]) -> Any:
    """The value of the first usual name that an entry has and that is not empty; None if there is none."""
    return next((entry[name] for name in ([asked] if asked else usual) if entry.get(name)), None)


def find_file(named: str, folder: Path, roots: Sequence[Path] | None) -> Path:
    """Return the path of a file that the data name.

    named: its name in the data, relative to the folder or absolute
    roots: folders it must lie in, after following links; None: anywhere
    Raises LeftOutError if the file is missing, elsewhere, or a device or pipe.
    """
    path = folder / named
    try:
        real = path.resolve()
        if roots is not None and not any(real.is_relative_to(root) for root in roots):
            raise LeftOutError(OUTSIDE)
        if not real.exists():
            raise LeftOutError(NO_FILE)
        if not real.is_file():
            raise LeftOutError(NOT_PLAIN)
    except LeftOutError:
        raise
    except (OSError, ValueError, RuntimeError):  # too long, NUL, a loop of links
        raise LeftOutError(NO_FILE) from None
    return path


def roots_of(folder: Path, columns: Columns) -> list[Path] | None:
    """Return the folders in which a data set's files may lie, for find_file."""
    return None if columns.allow_outside else [folder.resolve()]


METADATA, TABLE = "metadata.jsonl", "metadata.csv"


def from_jsonl(files: Iterable[Path], columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Read one image per line: {"file_name": …, "text": …}; paths are relative to the file.

    Raises UserError for a line that is not JSON, or names no image.
    """
    for file in files:
        for place, entry in read_json_lines(file):
            if not isinstance(entry, dict):
                raise UserError(f'{place} is no object; expected {{"file_name": "a.png", "text": "caption"}}')
            named = first_known(entry, columns.image, IMAGE_COLUMNS)
            if not isinstance(named, str):
                wanted = columns.image or "file_name"
                raise UserError(
                    f'{place} has no "{wanted}"; expected {{"{wanted}": "a.png", "text": "caption"}}'
                )
            caption = caption_of(first_known(entry, columns.caption, CAPTION_COLUMNS))
            yield from _listed(named, caption, file.parent, columns, skipped)


def from_csv(files: Iterable[Path], columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Read one image per row, below a row of column names.

    Raises UserError for a table without columns of images and captions.
    """
    for file in files:
        table = csv.DictReader(io.StringIO(read_text(file), newline=""))
        try:
            image, caption = columns.choose(table.fieldnames or [], str(file))
            for row in table:
                yield from _listed(row[image] or "", caption_of(row[caption]), file.parent, columns, skipped)
        except csv.Error as error:
            raise UserError(f"{file}, line {table.line_num} cannot be read as CSV: {error}") from None


def from_pairs(folder: Path, columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Read images with captions beside them in files of the same name (a.png, a.txt), also in sub-folders.

    A caption is all of a .txt, .caption or .text, or a value in a .json; the first one with text is taken.
    Raises UserError if no image has such a file.
    """
    groups: dict[str, dict[str, str]] = {}  # path without its ending -> ending -> path
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not is_hidden(name.as_posix()) and not path.is_dir():
            groups.setdefault(name.with_suffix("").as_posix(), {})[name.suffix[1:].lower()] = name.as_posix()
    captions = (*([columns.caption] if columns.caption else CAPTION_COLUMNS), "json")
    pictures = (columns.image,) if columns.image else IMAGE_ENDINGS
    found = False
    for beside in groups.values():
        texts = [beside[ending] for ending in captions if ending in beside]
        images = [name for ending, name in beside.items() if ending in pictures]
        found = found or bool(texts and images)
        if texts and not images:  # a file beside a caption is an image of another kind
            for name in (
                name for ending, name in beside.items() if ending not in (*captions, *CAPTION_COLUMNS)
            ):
                skipped.add(NO_IMAGE, name)
        for name in images:
            with skipped.noting(name):
                caption = next(filter(None, (_caption(folder, text, columns) for text in texts)), "")
                yield from _listed(name, caption, folder, columns, skipped)
    if not found:
        raise UserError(
            f"{folder} has no {METADATA}; write one with a line "
            '{"file_name": "a.png", "text": "caption"} per image, or put a .txt beside every image'
        )


def _listed(named: str, caption: str, folder: Path, columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Yield an image of a folder, or note why it is left out."""
    with skipped.noting(named):
        if not caption:
            raise LeftOutError(NO_CAPTION)
        file = find_file(named, folder, roots_of(folder, columns))
        yield Sample(named, caption, file_mark(file), functools.partial(read_bytes, file))


def _caption(folder: Path, name: str, columns: Columns) -> str:
    """The caption in a file beside an image; "" if there is none. Raises TextError if it is not text."""
    text = read_text(find_file(name, folder, roots_of(folder, columns)), LONGEST)
    return caption_in_json(text, columns.caption) if name.lower().endswith(".json") else caption_of(text)
