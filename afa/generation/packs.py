"""The finished images of a run in shards, as `afa train --data` reads them: tar or parquet.

tar:     as webdataset has it, NAME.png, NAME.txt (the prompt) and NAME.json (the settings) for every image
parquet: as `datasets` has it, the columns image, text, seed and settings (JSON)
Each shard is named by its first and last image, counted from 0.
"""

import functools
import io
import json
import math
import re
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from afa.data.hub import open_parquet, read_parquet
from afa.data.shards import members_of, read_part
from afa.data.sources import Skipped
from afa.errors import UserError
from afa.files import replacing
from afa.sampling.image_files import ImageFile

Reader = Callable[[], bytes]  # of one picture
NAME = re.compile(r"(\d{7,})-(\d{7,})\.(tar|parquet)")
FRESH = 2.0  # seconds that the list of shards is taken to be right: other commands may pack them, too
ROW_GROUP = 64  # images that a reader of parquet decodes at once
FEATURES = {
    "image": {"_type": "Image"},
    "text": {"dtype": "string", "_type": "Value"},
    "seed": {"dtype": "uint64", "_type": "Value"},
    "settings": {"dtype": "string", "_type": "Value"},
}


class Packs:
    """The shards of a run.

    folder: of the run
    kind:   tar or parquet; None: the run's images are files
    size:   images in a shard; the last one may have fewer
    Raises UserError for shards in the folder that such a run does not make.
    """

    def __init__(self, folder: Path, kind: str | None, size: int) -> None:
        self.folder, self.kind, self.size = folder, kind, size
        self._readers: dict[Path, list[Reader]] = {}
        self._listed: tuple[float, list[tuple[int, int, Path]]] = (-math.inf, [])  # when, what
        if kind == "parquet":
            _require_pyarrow()
        shards = {
            start: (count, path) for start, count, path in self._present()
        }  # the largest that begins so
        for start, (count, path) in shards.items():
            last = start == max(shards)
            if path.suffix != f".{kind}":
                raise UserError(
                    f"{folder} has its images in shards ({path.name}); give --pack {path.suffix[1:]}, "
                    "or choose another --output"
                )
            if start % size or count > size or (count < size and not last):
                raise UserError(
                    f"{path} holds {count} images, and --pack-size {size} is asked; give the size that "
                    "the folder was begun with, or choose another --output"
                )

    def _present(self) -> list[tuple[int, int, Path]]:
        """The first image, the number of images and the place of each shard, in order."""
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        matches = [(NAME.fullmatch(path.name), path) for path in names]
        ends = [(int(found[1]), int(found[2]), path) for found, path in matches if found]
        return sorted((start, end - start + 1, path) for start, end, path in ends if end >= start)

    def _shard(self, index: int) -> tuple[int, int, Path] | None:
        """The shard with an image; None if it is in none."""
        if time.monotonic() - self._listed[0] > FRESH:
            self._listed = time.monotonic(), self._present()
        holding = [one for one in self._listed[1] if one[0] <= index < one[0] + one[1]]
        return holding[-1] if holding else None

    def read(self, index: int) -> bytes | None:
        """The PNG of an image, counted from 0; None if it is in no shard.

        Raises UserError for a shard that does not hold as many images as its name says.
        """
        shard = None if self.kind is None else self._shard(index)
        if shard is None:
            return None
        start, count, path = shard
        if path not in self._readers:
            self._readers[path] = (_tar_readers if path.suffix == ".tar" else _parquet_readers)(path)
        readers = self._readers[path]
        if len(readers) != count:
            raise UserError(
                f"{path} holds {len(readers)} whole images, and its name says {count}; delete it, and they "
                "are drawn again"
            )
        try:
            return readers[index - start]()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it, and its images are drawn again"
            ) from None

    def _holds(self, start: int, count: int) -> bool:
        """Whether a shard is there that begins with an image and holds at least so many."""
        return any(first == start and held >= count for first, held, _ in self._present())

    def write(self, images: Sequence[ImageFile]) -> list[Path]:
        """Pack all images of a run, and remove their files. Returns the places of the shards.

        A shard appears whole before the files in it go; one that is there already is kept.
        """
        for start in tqdm(range(0, len(images), self.size), desc="packing", unit="shard"):
            chunk = images[start : start + self.size]
            if not self._holds(start, len(chunk)):
                path = self.folder / f"{start:07d}-{start + len(chunk) - 1:07d}.{self.kind}"
                try:
                    with replacing(path) as temporary:
                        (_write_tar if self.kind == "tar" else _write_parquet)(temporary, chunk)
                except FileNotFoundError:
                    if not self._holds(start, len(chunk)):  # else another command has packed it meanwhile
                        raise
            for smaller in [path for first, _, path in self._present() if first == start][:-1]:
                smaller.unlink(missing_ok=True)  # of a run with fewer prompts
            for image in chunk:
                image.path.unlink(missing_ok=True)
        (self.folder / "images.jsonl").unlink(missing_ok=True)  # of a run whose images were files
        return [path for _, _, path in self._present()]


def _settings(image: ImageFile) -> dict[str, Any]:
    found = image.found(whole=False)
    assert found is not None
    return found


def _tar_readers(path: Path) -> list[Reader]:
    """What reads each whole picture of a shard, in order."""
    try:
        found = [member for member in members_of(path, Skipped()) if member[0].endswith(".png")]
    except UserError:
        return []
    return [functools.partial(read_part, path, at, size) for _, at, size in found if size >= 0]


def _write_tar(path: Path, images: Sequence[ImageFile]) -> None:
    with tarfile.open(path, "w") as archive:
        for image in images:
            settings = json.dumps(_settings(image), ensure_ascii=False)
            parts = {"png": image.read(), "txt": image.request.prompt.encode(), "json": settings.encode()}
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{image.path.stem}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("--pack parquet needs pyarrow; install it with: pip install 'afa[data]'") from None


def _parquet_readers(path: Path) -> list[Reader]:
    """What reads each picture of a shard, in order; the row group of the last one is kept."""
    try:
        metadata = open_parquet(path).metadata
    except UserError:
        return []
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return [
        functools.partial(read_parquet, path, "image", group, row, _nowhere)
        for group, size in enumerate(sizes)
        for row in range(size)
    ]


def _nowhere(name: str) -> Path:
    """Pictures are in the shard itself; a place that a row names is not read."""
    raise OSError(f"{name} is not in the shard")


def _write_parquet(path: Path, images: Sequence[ImageFile]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        {
            "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
            "text": pyarrow.string(),
            "seed": pyarrow.uint64(),
            "settings": pyarrow.string(),
        },
        metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
    )
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(images), ROW_GROUP):
            rows = [
                {
                    "image": {"bytes": image.read(), "path": image.path.name},
                    "text": image.request.prompt,
                    "seed": image.request.seed,
                    "settings": json.dumps(_settings(image), ensure_ascii=False),
                }
                for image in images[start : start + ROW_GROUP]
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
