"""What frozen models say of images and captions, computed once for all runs: latents of the VAE, states of the text encoders."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.images import OPENER
from afa.training.pictures import Crop
from afa.training.sources.base import Sample
from afa.training.store import RowStore

MARKS = "images.txt"  # what is known of images without reading them
SIZES = 6
MARK = re.compile("[0-9a-f]{64} [0-9a-f]{64}")  # a line of that file


def content_hash(*modules: nn.Module) -> str:
    """Of everything in models that decides what they compute: class, config and weights."""
    total = hashlib.sha256()
    for module in modules:
        config = getattr(module, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        total.update(f"{type(module).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name} {tensor.dtype}".encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class Known:
    """An image that needs no reading. sha256: of its bytes. keys: of its rows."""

    sha256: bytes
    keys: list[str]


class LatentCache:
    """Moments and size conditions of images, by the image's content, its crop and the VAE.

    shape: of one image's moments (2C, h, w).
    """

    def __init__(self, folder: Path, vae: nn.Module, shape: Sequence[int]) -> None:
        place = folder / f"latents-{content_hash(vae)[:16]}"
        self.moments = RowStore(place / "moments" / "x".join(map(str, shape)), shape, torch.float32)
        self.sizes = RowStore(place / "sizes" / "x".join(map(str, shape)), (SIZES,), torch.float32)
        self._marks_file = folder / MARKS
        self._marks = dict(line.split() for line in _lines(self._marks_file))

    def find(self, sample: Sample, crops: Sequence[Crop]) -> Known | None:
        """What is known of an image and all its crops, None if anything is missing, or the image may have changed."""
        image = self._marks.get(_mark(sample))
        if image is None:
            return None
        keys = [row_key(image, crop) for crop in crops]
        return Known(bytes.fromhex(image), keys) if all(key in self.moments and key in self.sizes for key in keys) else None

    def add(self, keys: Sequence[str], moments: Tensor, sizes: Sequence[Sequence[float]]) -> None:
        """Keep the rows of a batch."""
        self.sizes.add(keys, torch.tensor(sizes))
        self.moments.add(keys, moments)

    def note(self, images: Iterable[tuple[Sample, bytes]]) -> None:
        """Remember the contents of images, so that they need not be read again until they change."""
        fresh = {_mark(sample): sha256.hex() for sample, sha256 in images}
        fresh = {mark: image for mark, image in fresh.items() if self._marks.get(mark) != image}
        if fresh:
            with self._marks_file.open("a") as file:
                file.write("".join(f"{mark} {image}\n" for mark, image in fresh.items()))
            self._marks |= fresh

    def refresh(self) -> None:
        """See what other processes have added."""
        self.moments.refresh()
        self.sizes.refresh()
        self._marks = dict(line.split() for line in _lines(self._marks_file))


class TextCache:
    """States of captions, by caption and text encoders. parts: name -> a stored tensor's shape and dtype, without the batch."""

    def __init__(self, folder: Path, identity: str, parts: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        place = folder / f"text-{identity[:16]}"
        self.stores = [RowStore(place / f"part-{index}", shape, dtype) for index, (shape, dtype) in enumerate(parts)]

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions that are not there, each once."""
        return [caption for caption in dict.fromkeys(captions) if any(caption_key(caption) not in store for store in self.stores)]

    def add(self, captions: Sequence[str], parts: Sequence[Tensor]) -> None:
        for store, part in zip(self.stores, parts, strict=True):
            store.add([caption_key(caption) for caption in captions], part)

    def read(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(store.read([caption_key(caption) for caption in captions]) for store in self.stores)

    def refresh(self) -> None:
        for store in self.stores:
            store.refresh()

    @property
    def row_bytes(self) -> int:
        return sum(store.row_bytes for store in self.stores)


def row_key(image: str, crop: Crop) -> str:
    """Of an image's content, how it is opened and how it is cut."""
    facts = f"{image} {crop.resolution} {crop.place} {crop.flip} {OPENER}"
    return hashlib.sha256(facts.encode()).hexdigest()


def caption_key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError if a disk has not so many bytes left."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"--cache {folder} needs {needed / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB left; give another place")


def _mark(sample: Sample) -> str:
    return hashlib.sha256(sample.mark.encode(errors="surrogateescape")).hexdigest()  # a path may be no UTF-8


def _lines(file: Path) -> list[str]:
    """The whole lines of a file; one that was cut off is no line."""
    text = file.read_text(encoding="ascii", errors="replace") if file.exists() else ""
    return [line for line in text[: text.rfind("\n") + 1].split("\n") if MARK.fullmatch(line)]
