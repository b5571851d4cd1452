"""Captioned images from folders and lists, and a record of images that are left out.

A reader yields the samples of a data set, and notes in a `Skipped` which images it leaves out, and why.
"""

import csv
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.files import write_atomically
from afa.schema import shown
from afa.text_files import (
    TextError,
    check_text,
    clean,
    parse_json,
    read_bytes,
    read_json_lines,
    read_text,
    split_lines,
)

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "file_name", "path", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "jp2")
LONGEST = 2**20  # bytes of a caption
BESIDE = ("caption", "txt")  # endings of files with captions that other trainers write
REPEATED = re.compile(r"([0-9]+)_(.+)", re.DOTALL)  # a folder's name, as kohya's scripts read it: 10_ring
MOST_REPEATS = 1000
# Why an image is left out.
NO_CAPTION, NO_FILE, BROKEN = "no caption", "no such file", "not readable as an image"
NO_IMAGE, NO_TEXT, NOT_PLAIN = "no image", "its caption is no UTF-8 text", "not a plain file"
OUTSIDE = "outside the data's folder, which needs --allow-outside"
NEVER = "its folder is repeated 0 times"
# What is said of images that are used.
MORE_LINES = "caption with more lines, of which the first with text is taken, as kohya's scripts do"
SEVERAL = "several caption files, of which the first in this order with text is taken"
IN_LIST = "captions in the list and in a file beside the image, of which the list's is taken"
FOLDER_NAME = "no caption file, and the folder's name taken as caption"


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned image.

    name:    shown to people, unique in its data set
    caption: its text
    mark:    identifies the image and its version: it changes when the file changes
    read:    returns the encoded image; raises OSError or UserError if it cannot be read
    repeats: how often it counts in a pass over the data
    file:    of the image, if it has one of its own
    """

    name: str
    caption: str
    mark: str
    read: Callable[[], bytes]
    repeats: int = 1
    file: Path | None = None


def file_mark(file: Path) -> str:
    """Return a mark of a file's path, size and time of change, without reading it."""
    facts = file.stat()
    return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"


class LeftOutError(OSError):
    """An image that is not used. Its text is one of the reasons above."""


@dataclass
class Skipped:
    """The names of images that are left out, by reason, and of images that something is said about.

    told: what is said of images that are used -> their names
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    told: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Note one image."""
        self.names.setdefault(reason, []).append(name)

    def tell(self, what: str, name: str) -> None:
        """Note what is to be said of one image that is used."""
        self.told.setdefault(what, []).append(name)

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
            f"{len(names)} left out: {why} ({_first(names)})" for why, names in self.names.items()
        )


def _first(names: Sequence[str]) -> str:
    """The first of some names, as a terminal may show it."""
    return f"{shown(names[0]).strip(chr(34))}{', …' if len(names) > 1 else ''}"


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
        counted = sum(sample.repeats for sample in self.samples)
        repeated = f", which count as {counted}" if counted != len(self.samples) else ""
        images = f"{len(self.samples)} captioned images{repeated}"
        return "; ".join(filter(None, (images, self.skipped.summary())))

    def tell(self) -> None:
        """Print what is to be said of images that are used, a line each, in one process of several."""
        if os.environ.get("RANK", "0") == "0":  # as torchrun and accelerate launch set it
            for what, names in self.skipped.told.items():
                print(f"afa: {len(names)} of the images: {what} ({_first(names)})", file=sys.stderr)


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
            yield from listed(named, caption, file.parent, columns, skipped)


def from_csv(files: Iterable[Path], columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Read one image per row, below a row of column names.

    Raises UserError for a table without columns of images and captions.
    """
    for file in files:
        table = csv.DictReader(io.StringIO(read_text(file), newline=""))
        try:
            image, caption = columns.choose(table.fieldnames or [], str(file))
            for row in table:
                yield from listed(row[image] or "", caption_of(row[caption]), file.parent, columns, skipped)
        except csv.Error as error:
            raise UserError(f"{file}, line {table.line_num} cannot be read as CSV: {error}") from None


def from_pairs(folder: Path, columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Read images with captions beside them in files of the same name (a.png, a.txt), also in sub-folders.

    A caption is the first line with text of a .text, .caption, .prompt or .txt, or a value in a .json; the
    first file with text is taken. Images below a folder such as 10_ring count 10 times in a pass, and the
    name, ring, is the caption of those that have no such file, as in kohya's scripts.
    Raises UserError if no image has a caption, or a folder is repeated more than MOST_REPEATS times.
    """
    groups: dict[str, dict[str, str]] = {}  # path without its ending -> ending -> path
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not is_hidden(name.as_posix()) and not path.is_dir():
            groups.setdefault(name.with_suffix("").as_posix(), {})[name.suffix[1:].lower()] = name.as_posix()
    captions = (*([columns.caption] if columns.caption else CAPTION_COLUMNS), "json")
    pictures = (columns.image,) if columns.image else IMAGE_ENDINGS
    found = False
    for stem, beside in groups.items():
        texts = [beside[ending] for ending in captions if ending in beside]
        images = [name for ending, name in beside.items() if ending in pictures]
        repeats, class_name = _repeated(stem, folder)
        found = found or bool((texts or class_name) and images)
        if texts and not images:  # a file beside a caption is an image of another kind
            for name in (
                name for ending, name in beside.items() if ending not in (*captions, *CAPTION_COLUMNS)
            ):
                skipped.add(NO_IMAGE, name)
        for name in images:
            with skipped.noting(name):
                if not repeats:
                    raise LeftOutError(NEVER)
                caption = _beside(folder, name, texts, columns, skipped) if texts else caption_of(class_name)
                if caption and not texts:
                    skipped.tell(FOLDER_NAME, name)
                yield from listed(name, caption, folder, columns, skipped, repeats)
    if not found:
        raise UserError(f"{folder} has no {METADATA}; {_advice(folder)}")


def _repeated(stem: str, folder: Path) -> tuple[int, str]:
    """Return how often an image counts, and what its folder's name says it shows; 1 and "" by default.

    stem:   its path in the data's folder
    folder: of the data, for an error
    The innermost folder whose name is of the form COUNT_NAME decides.
    """
    for name in reversed(stem.split("/")[:-1]):
        found = REPEATED.fullmatch(name)
        if found is not None:
            count = int(found[1][:9])
            if count > MOST_REPEATS:
                raise UserError(
                    f"{folder} holds the folder {shown(name)}, whose images would count {found[1][:9]} times "
                    f"in a pass, and at most {MOST_REPEATS} are possible; rename it (COUNT_NAME is read as "
                    "repeats)"
                )
            return count, found[2]
    return 1, ""


def _advice(folder: Path) -> str:
    """What to do with a folder that has neither a list nor captions beside its images."""
    lists = [path for name in (METADATA, TABLE) for path in folder.glob(f"*/{name}")]
    if lists:
        inside = ", ".join(shown(path.parent.name) for path in sorted(lists)[:3])
        return f"lists are in its folders {inside}: give one of these"
    return (
        'write one with a line {"file_name": "a.png", "text": "caption"} per image, or put a .txt beside '
        "every image"
    )


def _beside(folder: Path, image: str, texts: Sequence[str], columns: Columns, skipped: Skipped) -> str:
    """The caption in the first of the files beside an image that has one; "" if none has."""
    for name in texts:
        text = read_text(find_file(name, folder, roots_of(folder, columns)), LONGEST)
        if name.lower().endswith(".json"):
            found, more = caption_in_json(text, columns.caption), False
        else:
            lines = [line for line in map(caption_of, split_lines(text)) if line]
            found, more = next(iter(lines), ""), len(lines) > 1
        if found:
            if more:
                skipped.tell(MORE_LINES, image)
            if len(texts) > 1:
                skipped.tell(SEVERAL + f" ({', '.join(Path(text).suffix for text in texts)})", image)
            return found
    return ""


def listed(
    named: str,
    caption: str,
    folder: Path,
    columns: Columns,
    skipped: Skipped,
    repeats: int | None = None,
) -> Iterator[Sample]:
    """Yield an image of a folder, or note why it is left out.

    repeats: how often it counts; None: it is of a list, and counts once
    """
    with skipped.noting(named):
        if not caption:
            raise LeftOutError(NO_CAPTION)
        file = find_file(named, folder, roots_of(folder, columns))
        if repeats is None and any(file.with_suffix(f".{ending}").exists() for ending in BESIDE):
            skipped.tell(IN_LIST, named)
        read = functools.partial(read_bytes, file)
        yield Sample(named, caption, file_mark(file), read, repeats or 1, file)
