"""The images of one method: one PNG per item, which records how it was made; existing images are kept."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from afa.errors import UserError
from afa.evaluation.results import Item
from afa.files import replacing
from afa.images import CHUNK, read_made, read_pixels
from afa.sampling.sample import Request, Sampler, Sampling
from afa.schema import shown

FOREVER = 1e9  # seconds that no image takes


@dataclass(frozen=True)
class ImageSet:
    """A folder of PNGs.

    identity: everything that the images depend on besides prompt and seed; images of another one are refused
    """

    folder: Path
    items: Sequence[Item]
    sampling: Sampling
    identity: Mapping[str, Any]

    @cached_property
    def made_by(self) -> str:
        """Return a hash of the identity and the sampling options."""
        sampling = {
            name: value
            for name, value in vars(self.sampling).items()
            if name != "true_guidance" or value is not None
        }
        facts = json.dumps(
            [dict(self.identity), sampling], sort_keys=True, default=str
        )  # as it was before there was that
        return hashlib.sha256(facts.encode()).hexdigest()

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def missing(self) -> list[int]:
        """Return the items without an image.

        Raises UserError for an image that was made with other settings.
        """
        return [index for index in range(len(self.items)) if self._facts(index) is None]

    def _facts(self, index: int, whole: bool = True) -> dict[str, Any] | None:
        """Return the facts in a PNG; None if it is missing or damaged, then it is made again."""
        found = read_made(self.path(index), whole=whole)
        if found is None:
            return None
        item = self.items[index]
        asked = {"made_by": self.made_by, "prompt": item.caption, "seed": item.seed}
        for name, value in asked.items():
            if found.get(name) != value:
                raise UserError(
                    f"{self.path(index)} was made with {name} {shown(found.get(name))}, "
                    f"now {shown(value)} is asked;"
                    " choose another --output or delete the folder"
                )
        seconds = found.get("seconds")
        known = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < FOREVER
        return found if known else None

    def seconds(self) -> list[float]:
        """Return the seconds of each image, in the batch it was made in."""
        return [float((self._facts(index, whole=False) or {})["seconds"]) for index in range(len(self.items))]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (H, W, 3)."""
        return read_pixels(self.path(index))

    def read_all(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all images, one by one."""
        return (self.read(index) for index in range(len(self.items)))

    def write(self, index: int, image: NDArray[np.uint8], seconds: float) -> None:
        """Save one image with its facts, whole or not at all."""
        item = self.items[index]
        facts = {
            "made_by": self.made_by,
            "prompt": item.caption,
            "seed": item.seed,
            "seconds": round(seconds, 4),
            **self.identity,
        }
        chunk = PngImagePlugin.PngInfo()
        chunk.add_itxt(CHUNK, json.dumps(facts, ensure_ascii=False, default=str))
        with replacing(self.path(index)) as temporary:
            Image.fromarray(image).save(temporary, format="PNG", pnginfo=chunk)

    def digest(self) -> str:
        """Return a hash of all pixels and captions, in order."""
        total = hashlib.sha256()
        for index, item in enumerate(self.items):
            total.update(item.caption.encode() + self.read(index).tobytes())
        return total.hexdigest()


def make_images(images: ImageSet, make: Callable[[], Sampler], batch_size: int, title: str) -> None:
    """Make the missing images, batch by batch, over all processes. The model is made only if one is missing.

    Each image has its own seed, so batch and process change at most its rounding.
    """
    state = PartialState()
    missing = images.missing()
    state.wait_for_everyone()  # all processes look before one writes
    own = missing[state.process_index :: state.num_processes]
    if own:
        images.folder.mkdir(parents=True, exist_ok=True)
        sampler = make()
        done = len(images.items) - len(missing)
        with tqdm(
            total=done + len(own),
            initial=done,
            desc=title,
            unit="image",
            file=sys.stderr,
            disable=not state.is_main_process,
        ) as bar:
            for start in range(0, len(own), batch_size):
                batch = own[start : start + batch_size]
                _make_batch(images, sampler, batch)
                bar.update(len(batch))
    state.wait_for_everyone()


def _make_batch(images: ImageSet, sampler: Sampler, batch: list[int]) -> None:
    began = time.perf_counter()
    made = sampler(
        [Request(images.items[index].caption, images.items[index].seed) for index in batch], images.sampling
    )
    seconds = (time.perf_counter() - began) / len(batch)
    for index, image in zip(batch, made, strict=True):
        images.write(index, image, seconds)
