"""Image files of a run that can resume: each PNG says how it was made; one made the same way is kept."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from afa.errors import UserError
from afa.fingerprint import changed
from afa.images import read_made, save_picture
from afa.places import public_place
from afa.sampling.parameters import parameters
from afa.sampling.sample import Request, Sampler, Sampling
from afa.schema import shown

# What a PNG records only where it was asked for; where it is not, it is compared as None.
OPTIONAL = (
    "guidance_interval",
    "prompt_syntax",
    "base",
    "store",
    "reuse",
    "shared_guidance_weights",
)


@dataclass(frozen=True)
class ImageFile:
    """One image of a run.

    path:    of its PNG
    request: its prompt and seed
    facts:   what the PNG records; a PNG that records other values is refused
    files:   sha256 of what it is made from, recorded and compared as "files"; older pictures lack it
    notes:   what the PNG records besides, not compared
    packed:  reads the PNG from a shard; None if it is in none
    """

    path: Path
    request: Request
    facts: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    packed: Callable[[], bytes | None] = field(default=lambda: None)

    def read(self) -> bytes:
        """Return the PNG, of its file or of a shard. Raises OSError if it is in neither."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            data = self.packed()
            if data is None:
                raise
            return data

    def found(self, *, whole: bool = True) -> dict[str, Any] | None:
        """Return what the PNG records; None if it is missing or cut off, so that it has to be drawn.

        whole: decode it to the end
        Raises UserError if it was made with other settings or files.
        """
        found, packed = read_made(self.path, whole=whole), None
        if found is None and (packed := self.packed()) is not None:
            found = read_made(packed, whole=whole)
        if found is None:
            return None
        place, thing = str(self.path), "it"
        if packed is not None:
            place, thing = f"{self.path.name} in a shard of {self.path.parent}", "the shard"
        recorded = found.get("files")
        if isinstance(recorded, dict) and (clauses := changed(recorded, self.files)):
            raise UserError(
                f"{place} was made with other files: {clauses[0]}; restore them, or choose another --output"
            )
        if "source" in found:
            found["source"] = public_place(found["source"])  # older pictures name the whole place
        for name, value in (dict.fromkeys(OPTIONAL) | dict(self.facts)).items():
            if found.get(name) != value:
                then, now = (
                    shown(str(one) if isinstance(one, (dict, list)) else one)
                    for one in (found.get(name), value)
                )
                raise UserError(
                    f"{place} was made with {name} {then}, now {now} is asked; "
                    f"choose another --output or delete {thing}"
                )
        return found

    def save(self, image: NDArray[np.uint8], **notes: Any) -> None:
        """Save the image (H, W, 3), whole or not at all. notes: more that the PNG records."""
        files = {"files": dict(self.files)} if self.files else {}
        made = {**self.facts, **files, **self.notes, **notes}
        save_picture(self.path, image, made, parameters(made, image.shape[1], image.shape[0]))


def draw(
    files: Sequence[ImageFile],
    sampler: Sampler,
    sampling: Sampling,
    batch_size: int,
    bar: "tqdm[Any]",
    timed: bool = False,
    saves: bool = True,
) -> None:
    """Draw images batch by batch; each batch is saved at once, so Ctrl-C loses at most one.

    bar:   of progress, one step an image
    timed: record the seconds that each image took in its batch
    saves: False where another process saves the same images
    """
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        began = time.perf_counter()
        images = sampler([file.request for file in batch], sampling)
        seconds = round((time.perf_counter() - began) / len(batch), 4)
        for file, image in zip(batch, images, strict=True) if saves else ():
            file.save(image, **({"seconds": seconds} if timed else {}))
        bar.update(len(batch))
