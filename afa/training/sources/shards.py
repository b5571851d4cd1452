"""Tar shards in the layout of webdataset: files that share a name up to the first dot are one sample."""

import functools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.training.sources.base import (
    CAPTION_COLUMNS,
    NO_CAPTION,
    Columns,
    Sample,
    Skipped,
    Source,
    caption_of,
    file_mark,
    first_known,
)

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
BLOCK = 512  # of a tar archive
CUT_OFF = "its shard is cut off"

Member = tuple[str, int, int]  # name, where its bytes begin in the shard, how many there are


def expand(pattern: str) -> list[Path]:
    """The shards a pattern with {000..012}, * or ? names, in order."""
    found = RANGE.search(pattern)
    if found:
        low, high = found.groups()
        numbers = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
        return [path for number in numbers for path in expand(pattern[: found.start()] + number + pattern[found.end() :])]
    path = Path(pattern)
    return sorted(path.parent.glob(path.name)) if set(path.name) & set("*?[") else [path]


def from_shards(origin: str, shards: Iterable[Path], columns: Columns) -> Source:
    """Only headers and captions are read here; an image is read where it lies in its shard, so nothing is unpacked.

    Raises UserError for a shard that is no plain tar archive. One that was cut off gives what comes before the cut.
    """
    samples, skipped = [], Skipped()
    for shard in shards:
        mark = file_mark(shard)
        for key, members in groupby(_members(shard, skipped), key=lambda member: _key(member[0])):
            parts = {name.rpartition("/")[2].partition(".")[2].lower(): (offset, size) for name, offset, size in members}
            name = f"{shard.name}:{key}"
            image = next((parts[kind] for kind in ([columns.image] if columns.image else IMAGES) if kind in parts), None)
            caption = _caption(shard, parts, columns)
            if image is None:
                skipped.add("no image", name)
            elif not caption:
                skipped.add(NO_CAPTION, name)
            else:
                samples.append(Sample(name, caption, f"{mark} {image[0]}", functools.partial(read_part, shard, *image)))
    return Source(origin, samples, skipped)


def read_part(file: Path, offset: int, size: int) -> bytes:
    """Some bytes of a file. Raises OSError if it ends before."""
    with file.open("rb") as opened:
        opened.seek(offset)
        data = opened.read(size)
    if len(data) < size:
        raise OSError(f"{file} ends {size - len(data)} bytes too early")
    return data


def _members(shard: Path, skipped: Skipped) -> Iterator[Member]:
    """The files of a shard. One that was cut off is noted, whether in a header (which the reader passes over) or in a file."""
    size, whole = shard.stat().st_size, True
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                whole = member.offset_data + member.size <= size
                if member.isfile() and whole:
                    yield member.name, member.offset_data, member.size
                elif not whole:
                    skipped.add(CUT_OFF, f"{shard.name}:{member.name}")
    except tarfile.ReadError as error:
        if size % BLOCK == 0 or _compressed(shard):
            raise UserError(f"{shard} cannot be read as a plain tar archive ({error}); compressed shards must be decompressed first") from None
    if whole and size % BLOCK:
        skipped.add(CUT_OFF, shard.name)


def _compressed(shard: Path) -> bool:
    with shard.open("rb") as opened:
        return opened.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}" if folder else last.partition(".")[0]


def _caption(shard: Path, parts: dict[str, tuple[int, int]], columns: Columns) -> str:
    """From the text file of a sample, else from its JSON."""
    for kind in [columns.caption] if columns.caption else CAPTION_COLUMNS:
        if kind in parts:
            return read_part(shard, *parts[kind]).decode(errors="replace").strip()
    if "json" not in parts:
        return ""
    try:
        entry: Any = json.loads(read_part(shard, *parts["json"]))
    except ValueError:
        return ""
    return caption_of(first_known(entry, columns.caption, CAPTION_COLUMNS)) if isinstance(entry, dict) else ""
