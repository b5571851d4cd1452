"""The folder of pictures: the only one that the page writes to and reads from."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.errors import UserError
from afa.files import locked
from afa.images import open_image, read_made, save_picture
from afa.webui.order import text

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
        with contextlib.suppress(UserError), locked(folder):  # what a killed page left unfinished goes; several may share a gallery
            pass
        return cls(folder.resolve())

    def path(self, method: str, metadata: Mapping[str, Any]) -> Path:
        """Where a picture of this method and these settings lies, or will."""
        told = {name: value for name, value in metadata.items() if name not in UNMOVED}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        words = re.sub(r"[^a-z0-9]+", "-", str(metadata["prompt"]).lower()).strip("-")[:40].strip("-")
        return self.folder / f"{words or 'picture'}-{method.replace(':', '-')}-{metadata['seed']}-{digest}.png"

    def made(self, path: Path, metadata: Mapping[str, Any]) -> bool:
        """Whether this very picture is there. One that is broken is made again."""
        found = read_made(path) or {}
        told = json.loads(json.dumps(dict(metadata)))
        return bool(found) and all(found.get(name) == value for name, value in told.items() if name not in UNMOVED)

    def save(self, path: Path, image: NDArray[np.uint8], metadata: dict[str, Any]) -> None:
        """Whole or not at all."""
        save_picture(path, image, metadata)

    def pictures(self) -> tuple[list[Path], list[str]]:
        """The latest first, and for each file that is no whole picture a sentence with its name."""
        found = [path for path in self.folder.glob("[!.]*.png") if path.is_file() and not path.is_symlink()]
        latest = sorted(((path.stat().st_mtime_ns, path.name, path) for path in found), reverse=True)[:SHOWN]
        faults = {path: _fault(path, changed, path.stat().st_size) for changed, _, path in latest}
        return [path for path, fault in faults.items() if not fault], [fault for fault in faults.values() if fault]

    def find(self, name: str) -> Path:
        """A picture by its file name; nothing outside the folder has one. Raises UserError."""
        name = text("picture", name)
        for path in self.folder.glob("*.png"):
            if path.name == name and path.is_file() and not path.is_symlink():
                return path
        raise UserError(f"there is no picture '{name[:80]}' in the gallery; its pictures are named as in the list of `generate`")
