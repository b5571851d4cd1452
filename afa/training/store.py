"""Rows of one shape by key, in files that are only appended to and memory-mapped: what a cache is made of."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afa.errors import UserError

FORMAT = 1
META = "rows.json"
LINE = 65  # of a file of keys: 64 hexadecimal digits and the end of the line


class RowStore:
    """Tensors of one shape and dtype on disk, by a sha256 in hexadecimal.

    Every writer appends to files of its own, rows before keys, so that several may write at once and a crash costs the row it
    interrupted. What others have written since is seen after refresh(). Raises UserError for a folder of other rows.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, tuple(shape), dtype
        self.row_bytes = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize
        self._places: dict[str, tuple[int, int]] = {}  # key -> part, row
        self._parts: list[np.ndarray] = []
        self._known: dict[str, tuple[int, int]] = {}  # file of keys -> its part, how many of them are read
        self._writing: Path | None = None
        self._check()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, keys: Sequence[str], rows: Tensor) -> None:
        """Append rows (n, …) under n keys."""
        if rows.shape[1:] != self.shape or len(rows) != len(keys):
            raise ValueError(f"{len(keys)} rows of {self.shape} are kept in {self.folder}, got {tuple(rows.shape)}")
        if self._writing is None:
            self._begin()
        assert self._writing is not None
        with self._writing.with_suffix(".bin").open("ab") as data:
            data.write(rows.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes())
            data.flush()
            os.fsync(data.fileno())
        with self._writing.with_suffix(".keys").open("a") as names:
            names.write("".join(f"{key}\n" for key in keys))
        self.refresh()

    def read(self, keys: Sequence[str]) -> Tensor:
        """The rows of some keys, (n, …), copied from the mapped files."""
        found = torch.empty((len(keys), self.row_bytes), dtype=torch.uint8)
        for place, key in enumerate(keys):
            part, row = self._places[key]
            found[place] = torch.from_numpy(np.array(self._parts[part][row]))
        return found.view(self.dtype).view(len(keys), *self.shape)

    def refresh(self) -> None:
        """See what has been appended, here or by others."""
        for names in sorted(self.folder.glob("*.keys")):
            data = names.with_suffix(".bin")
            whole = min(names.stat().st_size // LINE, data.stat().st_size // self.row_bytes if data.exists() else 0)
            part, known = self._known.get(names.name, (len(self._parts), 0))
            if whole <= known:
                continue
            with names.open("rb") as file:
                file.seek(known * LINE)
                keys = file.read((whole - known) * LINE).decode().split()
            self._parts[part:] = [np.memmap(data, np.uint8, "r", shape=(whole, self.row_bytes)), *self._parts[part + 1 :]]
            self._places |= {key: (part, row) for row, key in enumerate(keys, known)}
            self._known[names.name] = part, whole

    def _check(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"format": FORMAT, "shape": list(self.shape), "dtype": str(self.dtype)}
        meta = self.folder / META
        if not meta.exists():
            temporary = meta.with_name(f".{META}-{os.getpid()}")
            temporary.write_text(json.dumps(facts))
            os.replace(temporary, meta)
        found = json.loads(meta.read_text())
        if found != facts:
            raise UserError(f"{self.folder} keeps rows of {found}, now {facts} are asked for; give another --cache")

    def _begin(self) -> None:
        """A part of this writer's own."""
        number = 0
        while self._writing is None:
            part = self.folder / f"part-{number:05d}.bin"
            try:
                part.touch(exist_ok=False)
                self._writing = part
            except FileExistsError:
                number += 1


class StoredRows:
    """Rows of a store in some order, indexed as a tensor is: with a list of places, or a slice."""

    def __init__(self, store: RowStore, keys: Sequence[str]) -> None:
        self.store, self.keys = store, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, places: list[int] | slice) -> Tensor:
        chosen = self.keys[places] if isinstance(places, slice) else [self.keys[place] for place in places]
        return self.store.read(chosen)
