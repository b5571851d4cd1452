"""A user's own scorer: a Python file with score(images, captions), and perhaps features(images)."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.errors import UserError
from afa.evaluation.metrics.base import Features, ImageMetric, SetMetric, Values
from afa.evaluation.metrics.frechet import FrechetDistance
from afa.evaluation.pictures import Picture
from afa.files import sha256


def load_scorer(path: Path) -> list[ImageMetric | SetMetric]:
    """The metrics of a scorer file: its scores, and with features() a Fréchet distance named frechet.

    The file is run; it may import files beside it. score(images (n, H, W, 3) uint8, captions) returns a dict of n values
    each, higher is better, the first leading; features(images) returns (n, D). Raises UserError if the file cannot be used.
    """
    module = run_file(path, "--scorer")
    if not callable(getattr(module, "score", None)):
        raise UserError(f"--scorer {path} has no function score(images, captions); it must return a dict of arrays, one value an image")
    scorer: list[ImageMetric | SetMetric] = [UserScore(path, module.score)]
    features = getattr(module, "features", None)
    return [*scorer, UserFrechet(path, features)] if callable(features) else scorer


def run_file(path: Path, flag: str) -> Any:
    """A user's Python file as a module; it may import files beside it. Raises UserError, naming the flag, if it cannot be run."""
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{flag} {path} is no Python file")
    name = f"afa_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag} {path} cannot be run: {type(error).__name__}: {error}") from error
    return module


class UserScore(ImageMetric):
    """The scores of a user's file, checked: finite, one an image, the same names every time."""

    def __init__(self, path: Path, function: Callable[..., Any]) -> None:
        self.path, self.function = path, function
        self.source = f"score() of {path.name} (sha256 {sha256(path)[:12]})"
        self.names = ()  # known once something has been scored

    @property
    def identity(self) -> dict[str, Any]:
        return {"file": sha256(self.path)}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images = _stacked(self.path, [picture.image for picture in pictures])
        values = self._call(images, [picture.caption for picture in pictures])
        if self.names and tuple(values) != self.names:
            raise UserError(f"score() of {self.path} returned {', '.join(values)} where it returned {', '.join(self.names)} before")
        self.names = tuple(values)
        return values

    def _call(self, images: NDArray[np.uint8], captions: list[str]) -> dict[str, Values]:
        found = self.function(images, captions)
        if not isinstance(found, dict) or not found:
            raise UserError(f"score() of {self.path} returned {type(found).__name__}, expected a dict of arrays with at least one")
        return {str(name): self._checked(str(name), value, len(images)) for name, value in found.items()}

    def _checked(self, name: str, value: Any, count: int) -> Values:
        """One score of all images."""
        try:
            numbers = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"score() of {self.path}: '{name}' is no array of numbers ({error})") from error
        if numbers.shape != (count,):
            raise UserError(f"score() of {self.path}: '{name}' has shape {numbers.shape} for {count} images, expected ({count},)")
        if not np.isfinite(numbers).all():
            raise UserError(f"score() of {self.path}: '{name}' is not finite for image {int(np.argmin(np.isfinite(numbers)))}")
        return numbers


class UserFrechet(FrechetDistance):
    """A Fréchet distance on a user's features."""

    name = "frechet"

    def __init__(self, path: Path, function: Callable[..., Any]) -> None:
        self.path, self.function = path, function
        self.source = f"Fréchet distance on features() of {path.name} (sha256 {sha256(path)[:12]})"

    @property
    def identity(self) -> dict[str, Any]:
        return {"file": sha256(self.path)}

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        try:
            found = np.asarray(self.function(_stacked(self.path, images)), np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"features() of {self.path} returned no array of numbers ({error})") from error
        if found.ndim != 2 or len(found) != len(images) or not np.isfinite(found).all():
            raise UserError(f"features() of {self.path} returned shape {found.shape} for {len(images)} images, expected ({len(images)}, D), finite")
        return found


def _stacked(path: Path, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(n, H, W, 3). Raises UserError if the images are not of one size."""
    sizes = sorted({image.shape for image in images})
    if len(sizes) > 1:
        raise UserError(f"--scorer {path} is given images of one size, and these have {len(sizes)}: {sizes[0]} and {sizes[1]} among them")
    return np.stack(images)
