"""The images of one method: one PNG per item, which records how it was made; existing images are kept."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from tqdm import tqdm

from afa.devices import peak_megabytes
from afa.evaluation.results import Item, image_name
from afa.evaluation.rows import MethodRow, in_words
from afa.files import write_atomically
from afa.fingerprint import digest
from afa.images import read_pixels
from afa.sampling.image_files import ImageFile, draw
from afa.sampling.sample import Request, Sampler, Sampling
from afa.store import kept_json

FOREVER = 1e9  # seconds that no image takes
MEMORY, MEMORY_STEPS = "memory.json", 2  # what one image takes, and the steps it is measured in


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
    def files(self) -> list[ImageFile]:
        """Return the file of each item. A hash of identity and sampling tells how it was made."""
        sampling = vars(self.sampling)
        if self.sampling.true_guidance is None:
            sampling = {name: value for name, value in sampling.items() if name != "true_guidance"}
        made_by = digest([dict(self.identity), sampling])  # as it was before there was true_guidance
        return [
            ImageFile(
                self.folder / image_name(index),
                Request(item.caption, item.seed),
                {"made_by": made_by, "prompt": item.caption, "seed": item.seed},
                notes=self.identity,
            )
            for index, item in enumerate(self.items)
        ]

    def missing(self) -> list[ImageFile]:
        """Return the files that have to be drawn: no whole image, or one that does not say how long it took.

        Raises UserError for an image that was made with other settings.
        """
        return [file for file in self.files if _seconds(file.found()) is None]

    def seconds(self) -> list[float]:
        """Return the seconds of each image, in the batch it was made in."""
        return [float((file.found(whole=False) or {})["seconds"]) for file in self.files]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (H, W, 3)."""
        return read_pixels(self.files[index].path)

    def read_all(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all images, one by one."""
        return (self.read(index) for index in range(len(self.items)))

    def digest(self) -> str:
        """Return a hash of all pixels and captions, in order."""
        total = hashlib.sha256()
        for item, image in zip(self.items, self.read_all(), strict=True):
            total.update(item.caption.encode() + image.tobytes())
        return total.hexdigest()


def _seconds(found: Mapping[str, Any] | None) -> float | None:
    """The seconds that an image says it took; None if it does not say so."""
    seconds = (found or {}).get("seconds")
    known = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < FOREVER
    return float(seconds) if known else None


def drawn_name(row: MethodRow, at: Mapping[str, Any]) -> str:
    """Return the row's name, with its number of steps if that is not the protocol's.

    at: its values that differ from the protocol's
    """
    return f"{row.name}, {in_words('steps', at['steps'])}" if "steps" in at else row.name


def image_folder(output: Path, row: MethodRow, run: int, at: Mapping[str, Any] | None = None) -> Path:
    """Return the folder of the images of a row's run; no other row, and no other value, has it.

    Different names may give the same folder name (`a b` and `a-b`, or `a-10-steps` and `a` in 10 steps), so a
    hash of the name tells them apart.
    at: its values of settings.AXES that differ from the protocol's
    """
    at = at or {}
    drawn = drawn_name(row, at)
    name = re.sub("[ ,:]", "-", drawn.replace(", ", "-"))
    if re.search(r"[ ,]|-steps$", row.name.partition(":")[2]):
        name += f"-{digest({drawn: 'steps' if 'steps' in at else ''})[:8]}"
    folder = output / "images" / name
    if "guidance" in at:
        folder /= in_words("guidance", at["guidance"]).replace(" ", "-")
    return folder / f"seed-{run}" if row.train is not None else folder


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
        sampler, done = make(), len(images.items) - len(missing)
        with tqdm(
            total=done + len(own),
            initial=done,
            desc=title,
            unit="image",
            file=sys.stderr,
            disable=not state.is_main_process,
        ) as bar:
            draw(own, sampler, images.sampling, batch_size, bar, timed=True)
    state.wait_for_everyone()


def measured_memory(images: ImageSet, make: Callable[[], Sampler]) -> float:
    """Return the peak megabytes of tensors while one image is made in two steps.

    One process measures it once; it is kept beside the images.
    """
    file = images.folder / MEMORY

    def known() -> float:
        kept: dict[str, float] = kept_json(file, dict[str, float]) or {}
        return kept.get("megabytes", 0.0)

    if PartialState().is_main_process and not known():
        short = replace(images.sampling, steps=min(MEMORY_STEPS, images.sampling.steps))
        sampler, requests = make(), [images.files[0].request]
        megabytes = peak_megabytes(lambda: sampler(requests, short))
        write_atomically(file, json.dumps({"megabytes": round(megabytes, 2)}))
    PartialState().wait_for_everyone()
    return known()
