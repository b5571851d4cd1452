"""The folder of pictures, the only folder that the page writes to and reads from, and the weight maps of the latest pictures."""

import contextlib
import functools
import hashlib
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
from afa.images import open_image, read_made, save_picture
from afa.pictures import conditional, mean_over_stages
from afa.webui.request_validation import text

SHOWN = 60  # of the latest pictures
UNMOVED = ("source",)  # what a picture says that does not change how it looks


@functools.lru_cache(maxsize=1000)
def _fault(path: Path, changed: int, size: int) -> str:
    """Why a picture cannot be shown, "" if it can. changed, size: of the file; looked at again when they differ."""
    try:
        open_image(path, path.name)
    except UserError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Gallery:
    """Pictures under names made of what they are, so that the same one is made once and none takes another's place."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Gallery":
        """Make the folder if it is not there. Raises UserError if it cannot be one."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with (
            contextlib.suppress(UserError),
            locked(folder),
        ):  # what a killed page left unfinished goes; several may share a gallery
            pass
        return cls(folder.resolve())

    def path(self, method: str, metadata: Mapping[str, Any]) -> Path:
        """Where a picture of this method and these settings lies, or will."""
        told = {name: value for name, value in metadata.items() if name not in UNMOVED}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        words = re.sub(r"[^a-z0-9]+", "-", str(metadata["prompt"]).lower()).strip("-")[:40].strip("-")
        return (
            self.folder / f"{words or 'picture'}-{method.replace(':', '-')}-{metadata['seed']}-{digest}.png"
        )

    def made(self, path: Path, metadata: Mapping[str, Any]) -> bool:
        """Whether this very picture is there. One that is broken is made again."""
        found = read_made(path) or {}
        told = json.loads(json.dumps(dict(metadata)))
        return bool(found) and all(
            found.get(name) == value for name, value in told.items() if name not in UNMOVED
        )

    def save(self, path: Path, image: NDArray[np.uint8], metadata: dict[str, Any]) -> None:
        """Whole or not at all."""
        save_picture(path, image, metadata)

    def pictures(self) -> tuple[list[Path], list[str]]:
        """The latest first, and for each file that is no whole picture a sentence with its name."""
        found = [path for path in self.folder.glob("[!.]*.png") if path.is_file() and not path.is_symlink()]
        latest = sorted(((path.stat().st_mtime_ns, path.name, path) for path in found), reverse=True)[:SHOWN]
        faults = {path: _fault(path, changed, path.stat().st_size) for changed, _, path in latest}
        return [path for path, fault in faults.items() if not fault], [
            fault for fault in faults.values() if fault
        ]

    def find(self, name: str) -> Path:
        """A picture by its file name; nothing outside the folder has one. Raises UserError."""
        name = text("picture", name)
        for path in self.folder.glob("*.png"):
            if path.name == name and path.is_file() and not path.is_symlink():
                return path
        raise UserError(
            f"there is no picture '{name[:80]}' in the gallery; its pictures are named as in the list of `generate`"
        )


ROOM = 256 * 2**20  # bytes of maps kept, of the latest pictures


@dataclass(frozen=True)
class RecordedWeights:
    """One picture and the weights it was made with.

    image (H, W, 3) uint8. timesteps: of each pass. maps: by stage, (passes, N, h, w) float16, the passes with the prompt.
    """

    image: NDArray[np.uint8]
    experts: tuple[str, ...]
    timesteps: tuple[float, ...]
    maps: dict[str, NDArray[np.float16]]

    @classmethod
    def of(cls, image: NDArray[np.uint8], recorded: WeightMaps) -> "RecordedWeights":
        """Of the only image of a batch."""
        passes = [{name: weights[0] for name, weights in one.items()} for one in conditional(recorded, 1)]
        maps = {name: torch.stack([one[name] for one in passes]).half().numpy() for name in passes[0]}
        return cls(image, tuple(recorded.experts), tuple(recorded.timesteps), maps)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.image.nbytes + sum(weights.nbytes for weights in self.maps.values())

    def look(self, step: int, stage: str) -> NDArray[np.float32]:
        """The weights at one step, counted from 1, and stage; 0 and "": the mean over all. -> (N, H, W) in the image's size, convex.

        Raises UserError for a step or stage that the picture has not.
        """
        if stage and stage not in self.maps:
            raise UserError(
                f"this picture has no weights at stage '{stage}'; it has them at {', '.join(self.maps)}"
            )
        if not 0 <= step <= len(self.timesteps):
            raise UserError(
                f"this picture has {len(self.timesteps)} steps, and step {step} is asked for; 0 is the mean over all"
            )
        chosen = {name: weights for name, weights in self.maps.items() if stage in ("", name)}
        at = {name: torch.from_numpy(self._at(weights, step))[None] for name, weights in chosen.items()}
        height, width = self.image.shape[:2]
        return np.asarray(mean_over_stages(at, (height, width))[0].numpy())

    def _at(self, weights: NDArray[np.float16], step: int) -> NDArray[np.float32]:
        found = weights.astype(np.float32).mean(0) if step == 0 else weights[step - 1].astype(np.float32)
        return np.asarray(found, np.float32)


class WeightMapCache:
    """RecordedWeights maps by the picture's file name; the oldest make room for new ones."""

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._kept: OrderedDict[str, RecordedWeights] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def put(self, name: str, kept: RecordedWeights) -> None:
        """Keep one; the latest stays however large it is."""
        self._kept.pop(name, None)
        self._kept[name] = kept
        while len(self._kept) > 1 and sum(one.size for one in self._kept.values()) > self.room:
            self._kept.popitem(last=False)

    def get(self, name: str) -> RecordedWeights:
        """Raises UserError for a picture whose maps are not kept, or that has none."""
        try:
            return self._kept[name]
        except KeyError:
            raise UserError(
                f"there are no weight maps of {name[:80]} here; make the picture again, with a method that weighs experts"
            ) from None
