"""The folder of pictures and the weight maps of the latest pictures.

The page writes to no other folder, and reads pictures from no other folder.
"""

import contextlib
import functools
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from afa.denoiser.hooks import WeightMaps
from afa.errors import UserError
from afa.files import locked
from afa.fingerprint import digest
from afa.images import open_image, read_made
from afa.pictures import conditional, mean_over_stages
from afa.webui.request_validation import text

SHOWN = 60  # the number of pictures that the gallery shows
UNMOVED = ("source",)  # metadata that do not change the picture


@functools.lru_cache(maxsize=1000)
def _fault(path: Path, changed: int, size: int) -> str:
    """Return why a picture cannot be shown; "" if it can.

    changed, size: of the file; they are part of the cache key, so that a changed file is read again
    """
    try:
        open_image(path, path.name)
    except UserError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Gallery:
    """A folder of pictures whose file names are derived from their metadata.

    The same picture is made only once, and no picture overwrites another.
    """

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Gallery":
        """Create the folder if it does not exist. Raises UserError if the path is a file."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        # Locking deletes unfinished files of a killed page; several pages may share a gallery.
        with contextlib.suppress(UserError), locked(folder):
            pass
        return cls(folder.resolve())

    def path(self, method: str, metadata: Mapping[str, Any]) -> Path:
        """Return the path of a picture of this method with these metadata."""
        described = {
            name: value
            for name, value in metadata.items()
            if name not in UNMOVED and (name, value) != ("regions", None)  # older pictures keep their names
        }
        words = re.sub(r"[^a-z0-9]+", "-", str(metadata["prompt"]).lower()).strip("-")[:40].strip("-")
        name = f"{words or 'picture'}-{method.replace(':', '-')}-{metadata['seed']}"
        return self.folder / f"{name}-{digest(described)[:12]}.png"

    def made(self, path: Path, metadata: Mapping[str, Any]) -> bool:
        """Return whether the picture exists, is readable, and has these metadata."""
        found = read_made(path) or {}
        expected = json.loads(json.dumps(dict(metadata)))
        return bool(found) and all(
            found.get(name) == value for name, value in expected.items() if name not in UNMOVED
        )

    def pictures(self) -> tuple[list[Path], list[str]]:
        """Return the latest pictures, the newest first, and a sentence for each unreadable file."""
        found = [path for path in self.folder.glob("[!.]*.png") if path.is_file() and not path.is_symlink()]
        latest = sorted(((path.stat().st_mtime_ns, path.name, path) for path in found), reverse=True)[:SHOWN]
        faults = {path: _fault(path, changed, path.stat().st_size) for changed, _, path in latest}
        return [path for path, fault in faults.items() if not fault], [
            fault for fault in faults.values() if fault
        ]

    def find(self, name: str) -> Path:
        """Return the path of a picture by its file name. Raises UserError for a name not in the folder."""
        name = text("picture", name)
        for path in self.folder.glob("*.png"):
            if path.name == name and path.is_file() and not path.is_symlink():
                return path
        raise UserError(
            f"there is no picture '{name[:80]}' in the gallery;"
            " its pictures are named as in the list of `generate`"
        )


ROOM = 256 * 2**20  # bytes of weight maps that are kept


@dataclass(frozen=True)
class RecordedWeights:
    """A picture and its weight maps.

    image:     (H, W, 3) uint8
    experts:   names (N)
    timesteps: one for each pass
    maps:      stage -> (passes, N, h, w) float16 of the conditional passes
    """

    image: NDArray[np.uint8]
    experts: tuple[str, ...]
    timesteps: tuple[float, ...]
    maps: dict[str, NDArray[np.float16]]

    @classmethod
    def of(cls, image: NDArray[np.uint8], recorded: WeightMaps) -> "RecordedWeights":
        """Keep the weights of a batch of one image."""
        passes = [{name: weights[0] for name, weights in one.items()} for one in conditional(recorded, 1)]
        maps = {name: torch.stack([one[name] for one in passes]).half().numpy() for name in passes[0]}
        return cls(image, tuple(recorded.experts), tuple(recorded.timesteps), maps)

    @property
    def size(self) -> int:
        """The memory in bytes."""
        return self.image.nbytes + sum(weights.nbytes for weights in self.maps.values())

    def look(self, step: int, stage: str) -> NDArray[np.float32]:
        """Return the weights at one step and stage, resized to the image: (N, H, W), sum 1 over N.

        step:  counted from 1; 0: mean over all steps
        stage: its name; "": mean over all stages
        Raises UserError for a step or stage that the picture does not have.
        """
        if stage and stage not in self.maps:
            raise UserError(
                f"this picture has no weights at stage '{stage}'; it has them at {', '.join(self.maps)}"
            )
        if not 0 <= step <= len(self.timesteps):
            raise UserError(
                f"this picture has {len(self.timesteps)} steps, and step {step} is asked for;"
                " 0 is the mean over all"
            )
        chosen = {name: weights for name, weights in self.maps.items() if stage in ("", name)}
        at = {name: torch.from_numpy(self._at(weights, step))[None] for name, weights in chosen.items()}
        height, width = self.image.shape[:2]
        return np.asarray(mean_over_stages(at, (height, width))[0].numpy())

    def _at(self, weights: NDArray[np.float16], step: int) -> NDArray[np.float32]:
        found = weights.astype(np.float32).mean(0) if step == 0 else weights[step - 1].astype(np.float32)
        return np.asarray(found, np.float32)


class WeightMapCache:
    """Weight maps by the picture's file name; the oldest are deleted when the memory limit is reached.

    room: the limit in bytes
    """

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._kept: OrderedDict[str, RecordedWeights] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def put(self, name: str, kept: RecordedWeights) -> None:
        """Keep the weights of one picture; the latest is kept even if it exceeds the limit."""
        self._kept.pop(name, None)
        self._kept[name] = kept
        while len(self._kept) > 1 and sum(one.size for one in self._kept.values()) > self.room:
            self._kept.popitem(last=False)

    def get(self, name: str) -> RecordedWeights:
        """Return the weights of one picture. Raises UserError if they are not kept."""
        try:
            return self._kept[name]
        except KeyError:
            raise UserError(
                f"there are no weight maps of {name[:80]} here;"
                " make the picture again, with a method that weighs experts"
            ) from None
