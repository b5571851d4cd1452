"""Tar shards in the layout of webdataset: files that share a name up to the first dot are one sample."""

import functools
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod
from pathlib import Path

from afa.data.sources import (
    CAPTION_COLUMNS,
    IMAGE_ENDINGS,
    LONGEST,
    NO_CAPTION,
    NO_IMAGE,
    NOT_PLAIN,
    Columns,
    LeftOutError,
    Sample,
    Skipped,
    caption_in_json,
    caption_of,
    file_mark,
    is_hidden,
)
from afa.errors import UserError
from afa.text_files import TextError, decode_text

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_SHARDS = 100_000  # that a pattern may name
BLOCK = 512  # of a tar archive
CUT_OFF = "its shard is cut off"
# What tarfile raises for headers that are none.
TAR_ERRORS = (tarfile.TarError, ValueError, KeyError, OverflowError, EOFError, RecursionError, MemoryError)

# Name, where its bytes begin in the shard, how many there are; -1: it has none of its own.
Member = tuple[str, int, int]


def expand(pattern: str) -> list[Path]:
    """The shards that a pattern with {000..012}, * or ? names, in order.

    Raises UserError for more than MOST_SHARDS.
    """
    ranges = [(low, high) for low, high in RANGE.findall(pattern)]
    count = prod(
        max(0, int(high[-18:]) - int(low[-18:]) + 1) if len(high) < 18 else MOST_SHARDS + 1
        for low, high in ranges
    )
    if count > MOST_SHARDS:
        raise UserError(
            f"{pattern[:200]} names {count:,} shards or more, and at most {MOST_SHARDS:,} are read; "
            "give a smaller range"
        )
    found = RANGE.search(pattern)
    if found:
        low, high = found.groups()
        numbers = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
        return [
            path
            for number in numbers
            for path in expand(pattern[: found.start()] + number + pattern[found.end() :])
        ]
    path = Path(pattern)
    return sorted(path.parent.glob(path.name)) if set(path.name) & set("*?[") else [path]


def from_shards(shards: Iterable[Path], columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    """Read the images of tar shards. Only headers and captions are read here; nothing is unpacked.

    A shard that was cut off gives the images before the cut. Raises UserError for a file that is not a plain
    tar archive.
    """
    endings = (columns.image,) if columns.image else IMAGE_ENDINGS
    for shard in shards:
        mark = file_mark(shard)
        for key, members in groupby(members_of(shard, skipped), key=lambda member: _key(member[0])):
            parts = {
                name.rpartition("/")[2].partition(".")[2].lower(): (at, size) for name, at, size in members
            }
            image = next((parts[kind] for kind in endings if kind in parts), None)
            name = f"{shard.name}:{key}"
            with skipped.noting(name):
                if any(size < 0 for _, size in parts.values()):
                    raise LeftOutError(NOT_PLAIN)
                if image is None:
                    raise LeftOutError(NO_IMAGE)
                caption = _caption(shard, parts, columns)
                if not caption:
                    raise LeftOutError(NO_CAPTION)
                yield Sample(name, caption, f"{mark} {image[0]}", functools.partial(read_part, shard, *image))


def read_part(file: Path, offset: int, size: int) -> bytes:
    """Bytes of a file from an offset. Raises OSError if the file is too short."""
    with file.open("rb") as opened:
        opened.seek(offset)
        data = opened.read(size)
    if len(data) < size:
        raise OSError(f"{file} ends {size - len(data)} bytes too early")
    return data


def members_of(shard: Path, skipped: Skipped) -> Iterator[Member]:
    """Yield the files of a shard but hidden ones: name, offset and size, -1 for what is no plain file.

    A shard that was cut off is noted, whether in a header (which tarfile ignores) or in a file.
    Raises UserError for a file that is not a plain tar archive.
    """
    length, whole, last = shard.stat().st_size, True, -1
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.size < 0 or member.offset_data <= last:  # or it would be read for ever
                    raise tarfile.ReadError("a header points backwards")
                last = member.offset_data
                plain = member.isreg() and not member.issparse()
                whole = not plain or member.offset_data + member.size <= length
                if not whole:
                    skipped.add(CUT_OFF, f"{shard.name}:{member.name}")
                elif not member.isdir() and not is_hidden(member.name):
                    yield member.name, member.offset_data, member.size if plain else -1
    except TAR_ERRORS as error:
        if not isinstance(error, tarfile.ReadError) or length % BLOCK == 0 or _compressed(shard):
            raise UserError(
                f"{shard} cannot be read as a plain tar archive ({error}); "
                "compressed shards must be decompressed first"
            ) from None
    if whole and length % BLOCK:
        skipped.add(CUT_OFF, shard.name)


def _compressed(shard: Path) -> bool:
    with shard.open("rb") as opened:
        return opened.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}" if folder else last.partition(".")[0]


def _caption(shard: Path, parts: dict[str, tuple[int, int]], columns: Columns) -> str:
    """The caption in the first file of a sample that has one; JSON comes last. Raises TextError."""
    for kind in (*([columns.caption] if columns.caption else CAPTION_COLUMNS), "json"):
        offset, size = parts.get(kind, (0, 0))
        if size > LONGEST:
            raise TextError("a caption is too long")
        text = decode_text(read_part(shard, offset, size), "a caption")
        caption = caption_in_json(text, columns.caption) if kind == "json" else caption_of(text)
        if caption:
            return caption
    return ""
