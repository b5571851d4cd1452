"""What an expert answered, on disk image by image: a run that was cut off goes on at the next image."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.files import replacing, write_atomically
from afa.screening.asking import Answers

DONE, ERRORS, FEATURES = "done", "errors.npy", "features.npz"


class Store:
    """The answers of one expert in a folder. shape: of all errors (M, BANDS, D, C, h, w); float32, memory-mapped."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / DONE
        self.done = int(mark.read_text()) if mark.exists() else 0
        mode = "r+" if (folder / ERRORS).exists() and self.done else "w+"
        self._errors = np.lib.format.open_memmap(folder / ERRORS, mode=mode, dtype=np.float32, shape=None if mode == "r+" else shape)

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
        self.done += 1
        write_atomically(self.folder / DONE, str(self.done))

    def errors(self, image: int) -> Tensor:
        """(BANDS, D, C, h, w)."""
        return torch.from_numpy(np.array(self._errors[image]))

    def features(self) -> dict[str, NDArray[np.float32]]:
        """By stage, (samples, C, places)."""
        parts = [dict(np.load(file)) for file in sorted(self.folder.glob(f"*-{FEATURES}"))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _features(self, image: int) -> Path:
        return self.folder / f"{image:05d}-{FEATURES}"
