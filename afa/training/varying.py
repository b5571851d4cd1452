"""A cache for states of prompts whose length varies: no padding is kept, rows of about one length stand together."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from afa.training.cache import caption_key
from afa.training.store import RowStore

STEP = 16  # tokens: rows are as long as the next multiple


class VaryingTextCache:
    """States (T, D) of captions with a mask (T,) that keeps the first of them, by caption and text encoders; used as TextCache is.

    width: D. longest: tokens of the longest caption, for what the cache is expected to need.
    """

    def __init__(self, folder: Path, identity: str, width: int, dtype: torch.dtype, longest: int) -> None:
        self.place, self.width, self.dtype = folder / f"text-{identity[:16]}", width, dtype
        self.row_bytes = _row(longest) * width * dtype.itemsize + 8
        self.lengths = RowStore(self.place / "lengths", (1,), torch.int64)
        self.stores: dict[int, RowStore] = {}
        self.refresh()

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions that are not there, each once."""
        return [caption for caption in dict.fromkeys(captions) if caption_key(caption) not in self.lengths]

    def add(self, captions: Sequence[str], parts: Sequence[Tensor]) -> None:
        """Keep states (B, T, D) with their mask (B, T): states first, so that a length is there only with what it is of."""
        states, mask = parts
        keys, lengths = [caption_key(caption) for caption in captions], mask.sum(1).tolist()
        assert all(bool(kept[:length].all()) for kept, length in zip(mask, lengths, strict=True)), "padding stands behind a prompt"
        for size in sorted({_row(length) for length in lengths}):
            chosen = [place for place, length in enumerate(lengths) if _row(length) == size]
            rows = states.new_zeros(len(chosen), size, self.width)
            for row, place in zip(rows, chosen, strict=True):
                row[: lengths[place]] = states[place, : lengths[place]]
            self._store(size).add([keys[place] for place in chosen], rows)
        self.lengths.add(keys, torch.tensor(lengths).view(-1, 1))

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> states (B, T, D), zeros behind every prompt's end, and their mask (B, T); T: of the longest."""
        keys = [caption_key(caption) for caption in captions]
        lengths = self.lengths.read(keys)  # (B, 1)
        states = torch.zeros(len(keys), int(lengths.max()), self.width, dtype=self.dtype)
        for own, key, length in zip(states, keys, lengths.flatten().tolist(), strict=True):
            own[:length] = self._store(_row(length)).read([key])[0, :length]
        return states, torch.arange(states.shape[1])[None] < lengths

    def refresh(self) -> None:
        """See what other processes have added."""
        for folder in self.place.glob("states-*"):
            self._store(int(folder.name.removeprefix("states-")))
        for store in self.stores.values():
            store.refresh()
        self.lengths.refresh()

    def _store(self, length: int) -> RowStore:
        if length not in self.stores:
            self.stores[length] = RowStore(self.place / f"states-{length}", (length, self.width), self.dtype)
        return self.stores[length]


def _row(length: int) -> int:
    """How long the row of a prompt is."""
    return -(-length // STEP) * STEP
