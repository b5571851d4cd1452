"""A user's own scorer: a Python file with score(images, captions), and perhaps features(images)."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.errors import UserError
from afa.evaluation.metrics.base import ImageMetric, SetMetric, Values
from afa.evaluation.metrics.frechet import Moments, frechet_distance, moments
from afa.evaluation.pictures import Picture
from afa.experts.hashing import sha256


def load_scorer(path: Path) -> list[ImageMetric | SetMetric]:
    """The metrics of a scorer file: its scores, and with features() a Fréchet distance named frechet.

    The file is run. score(images (n, H, W, 3) uint8, captions) returns a dict of n values each, higher is better, the
    first leading; features(images) returns (n, D). Raises UserError if the file cannot be used.
    """
    module = _load(path)
    if not callable(getattr(module, "score", None)):
        raise UserError(f"--scorer {path} has no function score(images, captions); it must return a dict of arrays, one value an image")
    scorer: list[ImageMetric | SetMetric] = [UserScore(path, module.score)]
    features = getattr(module, "features", None)
    return [*scorer, UserFrechet(path, features)] if callable(features) else scorer


def _load(path: Path) -> Any:
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--scorer {path} is no Python file")
    spec = importlib.util.spec_from_file_location(f"afa_scorer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--scorer {path} cannot be run: {type(error).__name__}: {error}") from error
    return module


class UserScore(ImageMetric):
    """The scores of a user's file, checked: finite, one an image, the same names every time."""

    def __init__(self, path: Path, function: Callable[..., Any]) -> None:
        self.path, self.function = path, function
        self.source = f"score() of {path.name}"
        self.names = ()  # known once something has been scored

    @property
    def identity(self) -> dict[str, Any]:
        return {"file": sha256(self.path)}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images = [picture.image for picture in pictures]
        values = self._call(np.stack(images), [picture.caption for picture in pictures])
        if self.names and tuple(values) != self.names:
            raise UserError(f"score() of {self.path} returned {', '.join(values)} where it returned {', '.join(self.names)} before")
        self.names = tuple(values)
        return values

    def _call(self, images: NDArray[np.uint8], captions: list[str]) -> dict[str, Values]:
        found = self.function(images, captions)
        if not isinstance(found, dict) or not found:
            raise UserError(f"score() of {self.path} returned {type(found).__name__}, expected a dict of arrays with at least one")
        values = {str(name): np.asarray(value, np.float64) for name, value in found.items()}
        for name, value in values.items():
            if value.shape != (len(images),):
                raise UserError(f"score() of {self.path}: '{name}' has shape {value.shape} for {len(images)} images, expected ({len(images)},)")
            if not np.isfinite(value).all():
                raise UserError(f"score() of {self.path}: '{name}' is not finite for image {int(np.argmin(np.isfinite(value)))}")
        return values


class UserFrechet(SetMetric):
    """A Fréchet distance on a user's features."""

    name = "frechet"
    higher_is_better = False

    def __init__(self, path: Path, function: Callable[..., Any]) -> None:
        self.path, self.function = path, function
        self.source = f"Fréchet distance on features() of {path.name}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"file": sha256(self.path)}

    def features(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.floating]:
        found = np.asarray(self.function(np.stack(images)), np.float64)
        if found.ndim != 2 or len(found) != len(images) or not np.isfinite(found).all():
            raise UserError(f"features() of {self.path} returned shape {found.shape} for {len(images)} images, expected ({len(images)}, D), finite")
        return found

    def prepare(self, reference: NDArray[np.floating]) -> Moments:
        return moments(reference)

    def value(self, features: NDArray[np.floating], reference: Moments) -> float:
        return frechet_distance(features, reference)
