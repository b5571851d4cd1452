"""What runs keep on disk to go on with: rows of tensors by key, and values in JSON files.

Rows have one shape and lie in files that are only appended to and memory-mapped. Damaged rows and values
count as missing, and are made again.
"""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from afa.errors import UserError
from afa.files import json_or_none, locked, refuse_busy, write_atomically
from afa.schema import Count, build


def kept_json(file: Path, kind: Any) -> Any:
    """Return what a run keeps in a JSON file; None if it is not there, damaged, or not of that kind.

    kind: a type hint, as afa.schema.build takes it
    """
    try:
        return build(kind, json_or_none(file), file)
    except UserError:
        return None


class StoreFacts(TypedDict):
    """The content of META."""

    format: Literal[1]
    shape: list[Count]
    dtype: Literal["torch.float16", "torch.bfloat16", "torch.float32", "torch.float64", "torch.int64"]


FORMAT = 1
META = "rows.json"
LINE = 65  # of a file of keys: 64 hexadecimal digits and the end of the line
SUM = 9  # of a file of checksums: 8 hexadecimal digits and the end of the line


class RowStore:
    """Tensors of one shape and dtype on disk, by a sha256 in hexadecimal.

    Every writer appends to files of its own, rows and checksums before keys, so that several may write at
    once and a crash costs the row it interrupted. A damaged row counts as not there (parts of older versions
    have no checksums). What others have written since is seen after refresh(). Raises UserError for a folder
    of other rows.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, tuple(shape), dtype
        self.row_bytes = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize
        self._places: dict[str, list[tuple[int, int]]] = {}  # key -> its rows as (part, row); the last counts
        self._whole: set[str] = set()  # keys whose rows were checked
        self._sums: list[list[bytes]] = []  # of every part
        self._parts: list[np.ndarray] = []
        self._known: dict[str, tuple[int, int]] = {}  # file of keys -> its part, how many of them are read
        self._writing: Path | None = None
        self._check()
        self.refresh()

    @classmethod
    def existing(cls, folder: Path) -> "RowStore | None":
        """Open the rows that a folder keeps, whatever their shape; None if nothing was added to it yet."""
        if not (folder / META).exists():
            return None
        facts = _facts(folder)
        return cls(folder, facts["shape"], getattr(torch, facts["dtype"].removeprefix("torch.")))

    def __contains__(self, key: str) -> bool:
        places = self._places.get(key, [])
        while places and key not in self._whole:
            part, row = places[-1]
            sums = self._sums[part]
            if not sums or sums[row] == _sum(key, self._parts[part][row]):
                self._whole.add(key)
            else:
                places.pop()
        return bool(places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, keys: Sequence[str], rows: Tensor) -> None:
        """Append rows (n, …) under n keys."""
        if rows.shape[1:] != self.shape or len(rows) != len(keys):
            raise ValueError(
                f"{len(keys)} rows of {self.shape} are kept in {self.folder}, got {tuple(rows.shape)}"
            )
        if self._writing is None:
            self._begin()
        assert self._writing is not None
        plain = (
            rows.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().reshape(len(keys), -1)
        )
        with self._writing.with_suffix(".bin").open("ab") as data:
            data.write(plain.tobytes())
            data.flush()
            os.fsync(data.fileno())
        with self._writing.with_suffix(".sums").open("ab") as sums:
            sums.write(b"".join(_sum(key, row) for key, row in zip(keys, plain, strict=True)))
        with self._writing.with_suffix(".keys").open("a") as names:
            names.write("".join(f"{key}\n" for key in keys))
        self.refresh()

    def read(self, keys: Sequence[str]) -> Tensor:
        """Return the rows of some keys, (n, …), copied from the mapped files."""
        found = torch.empty((len(keys), self.row_bytes), dtype=torch.uint8)
        for place, key in enumerate(keys):
            if key not in self:
                raise UserError(
                    f"a row of the cache {self.folder} was damaged while it was in use; "
                    "run the same command again"
                )
            part, row = self._places[key][-1]
            found[place] = torch.from_numpy(np.array(self._parts[part][row]))
        return found.view(self.dtype).view(len(keys), *self.shape)

    def refresh(self) -> None:
        """Find the rows that were appended since, by this process or another."""
        for names in sorted(self.folder.glob("*.keys")):
            data = names.with_suffix(".bin")
            whole = min(
                names.stat().st_size // LINE, data.stat().st_size // self.row_bytes if data.exists() else 0
            )
            sums = _lines(names.with_suffix(".sums"), SUM)
            whole = min(whole, len(sums)) if sums is not None else whole
            part, known = self._known.get(names.name, (len(self._parts), 0))
            if whole <= known:
                continue
            with names.open("rb") as file:
                file.seek(known * LINE)
                text = file.read((whole - known) * LINE).decode("ascii", errors="replace")
            keys = [text[start : start + LINE - 1] for start in range(0, len(text), LINE)]
            self._parts[part:] = [
                np.memmap(data, np.uint8, "r", shape=(whole, self.row_bytes)),
                *self._parts[part + 1 :],
            ]
            self._sums[part:] = [sums or [], *self._sums[part + 1 :]]
            for row, key in enumerate(keys, known):
                self._places.setdefault(key, []).append((part, row))
                self._whole.discard(key)
            self._known[names.name] = part, whole

    def _check(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"format": FORMAT, "shape": list(self.shape), "dtype": str(self.dtype)}
        meta = self.folder / META
        if meta.exists():
            refuse_busy(
                meta, file=True, wait=60.0
            )  # removes the lock of a process that was killed while it held it
        else:
            with locked(meta, file=True, wait=60.0):  # others may begin the same cache
                write_atomically(meta, json.dumps(facts))
        found = _facts(self.folder)
        if found != facts:
            raise UserError(
                f"{self.folder} keeps rows of {found}, now {facts} are asked for; give another --cache"
            )

    def _begin(self) -> None:
        """Begin a part that only this writer appends to."""
        number = 0
        while self._writing is None:
            part = self.folder / f"part-{number:05d}.bin"
            try:
                part.touch(exist_ok=False)
                self._writing = part
            except FileExistsError:
                number += 1


def _facts(folder: Path) -> StoreFacts:
    """Return what rows a folder keeps. Raises UserError if its description is damaged."""
    found: StoreFacts | None = kept_json(folder / META, StoreFacts)
    if found is None:
        raise UserError(
            f"{folder / META} is damaged, so it is not known what rows its folder keeps; delete the folder, "
            "and its rows are made again"
        )
    return found


def _sum(key: str, row: np.ndarray) -> bytes:
    """Return the checksum of a row and its key, as a line."""
    return b"%08x\n" % zlib.crc32(row.tobytes(), zlib.crc32(key.encode()))


def _lines(file: Path, length: int) -> list[bytes] | None:
    """Return the whole lines of a file, each of that length; None if there is no such file."""
    if not file.exists():
        return None
    data = file.read_bytes()
    return [data[start : start + length] for start in range(0, len(data) - length + 1, length)]


class StoredRows:
    """Rows of a store in some order, indexed as a tensor is: with a list of places, or a slice."""

    def __init__(self, store: RowStore, keys: Sequence[str]) -> None:
        self.store, self.keys = store, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, places: list[int] | slice) -> Tensor:
        chosen = self.keys[places] if isinstance(places, slice) else [self.keys[place] for place in places]
        return self.store.read(chosen)
