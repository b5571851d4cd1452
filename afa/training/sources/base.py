"""What every source of captioned images gives: samples whose images are read one by one, and what had to be left out."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.files import write_atomically

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "file_name", "path", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
NO_CAPTION, NO_FILE, BROKEN = "no caption", "no such file", "not readable as an image"


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned image.

    name: for people, unique in its source. mark: of the image wherever it lies, and different when it changes. read: the image as it was encoded; raises
    OSError where it cannot be read.
    """

    name: str
    caption: str
    mark: str
    read: Callable[[], bytes]


def file_mark(file: Path) -> str:
    """Of a file and its content, without reading it."""
    facts = file.stat()
    return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"


@dataclass
class Skipped:
    """What is left out, by reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def counts(self) -> dict[str, int]:
        return {reason: len(names) for reason, names in self.names.items()}

    def write(self, file: Path) -> None:
        """One line an image: why, and which. No file if nothing is left out."""
        lines = [json.dumps({"reason": reason, "image": name}) for reason, names in self.names.items() for name in names]
        if lines:
            write_atomically(file, "\n".join(lines) + "\n")

    def summary(self) -> str:
        """One clause a reason, empty if nothing is left out."""
        return "; ".join(f"{len(names)} left out: {why} ({names[0]}{', …' if len(names) > 1 else ''})" for why, names in self.names.items())


@dataclass
class Source:
    """A data set as it lies there. origin: as it was given."""

    origin: str
    samples: Sequence[Sample]
    skipped: Skipped = field(default_factory=Skipped)

    def __post_init__(self) -> None:
        self.listed = len(self.samples) + len(self.skipped)  # before any image is read

    def summary(self) -> str:
        """One line: what there is, what was left out."""
        return "; ".join(part for part in (f"{len(self.samples)} captioned images", self.skipped.summary()) if part)


@dataclass(frozen=True)
class Columns:
    """What image and caption are called; None: the first of the usual names that is there."""

    image: str | None = None
    caption: str | None = None

    def choose(self, names: Iterable[str], what: str) -> tuple[str, str]:
        """-> the image's and the caption's. Raises UserError where one is missing."""
        known = list(names)
        return _one(self.image, IMAGE_COLUMNS, known, "image", what), _one(self.caption, CAPTION_COLUMNS, known, "caption", what)


def _one(asked: str | None, usual: Sequence[str], known: list[str], kind: str, what: str) -> str:
    found = next((name for name in ([asked] if asked else usual) if name in known), None)
    if found is None:
        lack = f"has no '{asked}'" if asked else f"has none of {', '.join(usual)}"
        raise UserError(f"{what} {lack} for the {kind}, only {', '.join(known) or 'nothing'}; say which with --{kind}-column")
    return found


def caption_of(value: Any) -> str:
    """A caption without blanks around it, empty if it is none; of several the first that says something."""
    if isinstance(value, (list, tuple)):
        return next((caption for caption in map(caption_of, value) if caption), "")
    return value.strip() if isinstance(value, str) else ""


def first_known(entry: Mapping[str, Any], asked: str | None, usual: Sequence[str]) -> Any:
    """The value of the first usual name that an entry has, None if it has none."""
    return next((entry[name] for name in ([asked] if asked else usual) if name in entry), None)
