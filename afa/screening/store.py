"""What an expert answered, on disk image by image: a run that was cut off goes on at the next image."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.files import json_or_none, read_arrays, replacing, write_atomically
from afa.screening.asking import Answers

DONE, ERRORS, FEATURES = "done", "errors.npy", "features.npz"


class Store:
    """The answers of one expert in a folder. shape: of all errors (M, BANDS, D, C, h, w); float32, memory-mapped.

    done: how many images, from the first on, have answers that are whole, by their checksums; what is damaged is asked again.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape
        folder.mkdir(parents=True, exist_ok=True)
        noted = json_or_none(folder / DONE)
        self._sums: list[Any] = noted if isinstance(noted, list) else []  # of every image: see _sum
        errors = self._open() if self._sums else None
        if errors is None:
            self._sums = []
            errors = np.lib.format.open_memmap(folder / ERRORS, mode="w+", dtype=np.float32, shape=shape)
        self._errors = errors
        whole = next((image for image, sum_ in enumerate(self._sums) if self._sum(image) != sum_), len(self._sums))
        self._sums = self._sums[:whole]

    @property
    def done(self) -> int:
        return len(self._sums)

    @property
    def complete(self) -> bool:
        return self.done >= self.shape[0]

    def add(self, answers: Answers) -> None:
        """Keep the next image's answers."""
        self._errors[self.done] = answers.errors.numpy()
        self._errors.flush()
        if answers.features:
            with replacing(self._features(self.done)) as temporary, temporary.open("wb") as file:
                np.savez(file, **{name: tensor.numpy() for name, tensor in answers.features.items()})
        self._sums.append(self._sum(self.done))
        write_atomically(self.folder / DONE, json.dumps(self._sums))

    def _open(self) -> np.memmap | None:
        """What is there; None if it is damaged, or of another shape."""
        try:
            found = np.lib.format.open_memmap(self.folder / ERRORS, mode="r+")
        except (OSError, ValueError):
            return None
        return found if found.shape == self.shape and found.dtype == np.float32 else None

    def _sum(self, image: int) -> list[int] | None:
        """What tells whether an image's answers are as they were written: crc32 of its errors, and whether it has whole features."""
        if image >= self.shape[0]:
            return None
        return [zlib.crc32(self._errors[image].tobytes()), int(read_arrays(self._features(image)) is not None)]

    def errors(self, image: int) -> Tensor:
        """(BANDS, D, C, h, w)."""
        return torch.from_numpy(np.array(self._errors[image]))

    def features(self) -> dict[str, NDArray[np.float32]]:
        """By stage, (samples, C, places)."""
        parts = [dict(np.load(file)) for file in sorted(self.folder.glob(f"*-{FEATURES}"))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _features(self, image: int) -> Path:
        return self.folder / f"{image:05d}-{FEATURES}"
