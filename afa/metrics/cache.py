"""A cache of image features on disk, keyed by the images' content.

folder/IDENTITY/*.npz:     shards of keys (n, 32) and features (n, D). Each has its own name and is written
                           whole, so a crash loses one chunk, and several processes may write at once.
folder/IDENTITY/sets/*.npy: the keys of a whole set, in order, by the set's name and the image opener's
version
                           (another version may decode the same files to other pixels).
"""

import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from afa.images import OPENER
from afa.metrics.base import Features, SetMetric, content_key

CHUNK = 128  # images in memory at once, and rows of a shard
BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
Image8 = NDArray[np.uint8]


def cached_features(
    metric: SetMetric, images: Callable[[], Iterable[Image8]], folder: Path, name: str | None = None
) -> Features:
    """Return the features (n, D) of a set's images, in order, and compute those that the cache lacks.

    images: returns an iterator over the images
    name:   identifies the set and changes when the set does (for example a hash of its files); a set that is
            known by name is not read. None: always read.
    Damaged shards are computed again.
    """
    store = FeatureStore(folder, metric.identity)
    noted = store.noted(name)
    if noted is not None and (found := store.gather(noted)) is not None:
        return found
    while True:
        keys = store.add(images(), metric)
        if (found := store.gather(keys)) is not None:
            store.note(name, keys)
            return found


class FeatureStore:
    """The shards of one identity, and which image's features each holds."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        self.places: dict[bytes, tuple[Path, int]] = {}
        for shard in sorted(self.folder.glob("*.npz")):
            self._learn(shard)

    def _learn(self, shard: Path) -> None:
        """Note which images a shard holds; one that is broken is removed."""
        keys = _read(shard, "keys")
        for row, key in enumerate(() if keys is None else keys):
            self.places[key.tobytes()] = (shard, row)

    def add(self, images: Iterable[Image8], metric: SetMetric) -> list[bytes]:
        """Compute missing features, chunk by chunk, and return the keys of all images in order.

        Raises ValueError if there are no images.
        """
        keys: list[bytes] = []
        for chunk in tqdm(_chunks(images), desc=f"features for {metric.name}", unit="chunk", leave=False):
            own = [content_key(image) for image in chunk]
            new = {key: image for key, image in zip(own, chunk, strict=True) if key not in self.places}
            if new:
                self._write(list(new), metric.features(list(new.values())))
            keys += own
        if not keys:
            raise ValueError(f"there are no images to compute features for {metric.name} of")
        return keys

    def _write(self, keys: list[bytes], features: Features) -> None:
        shard = self.folder / f"{uuid.uuid4().hex}.npz"
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        _write_whole(shard, lambda stream: np.savez(stream, keys=rows, features=features))
        self._learn(shard)

    def gather(self, keys: list[bytes]) -> Features | None:
        """Return the features of these images, in order; None if some are missing or damaged."""
        if any(key not in self.places for key in keys):
            return None
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            shard, row = self.places[key]
            wanted.setdefault(shard, []).append((place, row))
        found: Features | None = None
        for shard, pairs in wanted.items():
            features = _read(shard, "features")
            if features is None:
                self.places = {key: at for key, at in self.places.items() if at[0] != shard}
                return None
            if found is None:
                found = np.empty((len(keys), features.shape[1]), features.dtype)
            places, rows = zip(*pairs, strict=True)
            found[list(places)] = features[list(rows)]
        return found

    def noted(self, name: str | None) -> list[bytes] | None:
        """Return the keys of a set that was stored before; None if there are none."""
        if name is None or not self._note(name).exists():
            return None
        try:
            return [key.tobytes() for key in np.load(self._note(name))]
        except BROKEN:
            return None

    def note(self, name: str | None, keys: list[bytes]) -> None:
        """FeatureStore the keys of a set under its name."""
        if name is not None:
            rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
            _write_whole(self._note(name), lambda stream: np.save(stream, rows))

    def _note(self, name: str) -> Path:
        return self.folder / "sets" / f"{hashlib.sha256(f'{name} {OPENER}'.encode()).hexdigest()[:32]}.npy"


def _read(shard: Path, what: str) -> NDArray[Any] | None:
    """Return an array of a shard; None if the shard is gone, or damaged (then it is removed)."""
    try:
        with np.load(shard) as arrays:
            return arrays[what]
    except BROKEN:
        shard.unlink(missing_ok=True)
        return None


def _write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file atomically; several processes may write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            write(stream)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(images: Iterable[Image8]) -> Iterator[list[Image8]]:
    chunk: list[Image8] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
