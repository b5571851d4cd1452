"""A cache of image features on disk, keyed by the images' content.

folder/IDENTITY/       a RowStore: the features of each image by the hash of its pixels
folder/IDENTITY/sets/  the keys of a whole set, in order, by the set's name and the image opener's version
                       (another version may decode the same files to other pixels)
"""

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from afa.files import write_atomically
from afa.fingerprint import digest
from afa.images import OPENER
from afa.metrics.base import Features, SetMetric, content_key
from afa.store import RowStore, kept_json

CHUNK = 128  # images in memory at once
Image8 = NDArray[np.uint8]


def cached_features(
    metric: SetMetric, images: Callable[[], Iterable[Image8]], folder: Path, name: str | None = None
) -> Features:
    """Return the features (n, D) of a set's images, in order, and compute those that the cache lacks.

    images: returns an iterator over the images
    name:   identifies the set and changes when the set does (for example a hash of its files); a set that is
            known by name is not read. None: always read.
    Damaged features are computed again. Raises ValueError if there are no images.
    """
    store = FeatureStore(folder, metric.identity)
    note = store.folder / "sets" / f"{digest([name, OPENER])[:32]}.json"
    keys = None if name is None else kept_json(note, list[str])
    if keys is None or any(key not in store for key in keys):
        keys = store.add(images(), metric)
        if name is not None:
            note.parent.mkdir(exist_ok=True)
            write_atomically(note, json.dumps(keys))
    return store.read(keys)


class FeatureStore:
    """The features of images under one identity of a metric; their width is known from the first image on."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder / digest(identity)[:32]
        self.rows = RowStore.existing(self.folder)

    def __contains__(self, key: str) -> bool:
        return self.rows is not None and key in self.rows

    def add(self, images: Iterable[Image8], metric: SetMetric) -> list[str]:
        """Compute missing features, chunk by chunk, and return the keys of all images in order."""
        keys: list[str] = []
        rest = iter(images)
        chunks = iter(lambda: list(islice(rest, CHUNK)), [])
        for chunk in tqdm(chunks, desc=f"features for {metric.name}", unit="chunk", leave=False):
            own = [content_key(image).hex() for image in chunk]
            new = {key: image for key, image in zip(own, chunk, strict=True) if key not in self}
            if new:
                features = torch.from_numpy(metric.features(list(new.values())))
                if self.rows is None:
                    self.rows = RowStore(self.folder, features.shape[1:], features.dtype)
                self.rows.add(list(new), features)
            keys += own
        if not keys:
            raise ValueError(f"there are no images to compute features for {metric.name} of")
        return keys

    def read(self, keys: list[str]) -> Features:
        """Return the features (n, D) of images, in order."""
        assert self.rows is not None
        found: Features = self.rows.read(keys).numpy()
        return found
