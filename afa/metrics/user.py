"""A user's own scorer: a Python file with score(images, captions) and, optionally, features(images)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.errors import UserError
from afa.files import sha256
from afa.metrics.base import Features, ImageMetric, Picture, SetMetric, Values
from afa.metrics.frechet import FrechetDistance
from afa.user_files import UserFile

FLAG = "--scorer"
CAPTIONS = ("a picture of noise", "another picture of noise")  # of the two images that a scorer is tried on


def load_scorer(path: Path) -> list[ImageMetric | SetMetric]:
    """Return the metrics of a scorer file: its scores, and a Fréchet distance if it has features().

    path: a file that is run; it may import files beside it. Its functions:
          score(images, captions): images (n, H, W, 3) uint8; returns a dict of n values each, higher is
                                   better, the first one is the main score
          features(images):        returns (n, D)
    Raises UserError if the file cannot be used.
    """
    file = UserFile(path, FLAG)
    if not file.has("score"):
        raise UserError(
            f"--scorer {path} has no function score(images, captions); it must return a dict of arrays, "
            "one value an image"
        )
    scorer: list[ImageMetric | SetMetric] = [UserScore(file)]
    return [*scorer, UserFrechet(file)] if file.has("features") else scorer


def try_scorer(metrics: Sequence[object], height: int, width: int) -> None:
    """Call a user's functions once, on two images of noise, before anything is drawn.

    height, width: of the images to come, in pixels
    Raises UserError with the file's own error, or if it returned something unusable.
    """
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in CAPTIONS]
    for metric in metrics:
        if isinstance(metric, UserScore):
            metric.score(
                [
                    Picture(image, caption, place)
                    for place, (image, caption) in enumerate(zip(images, CAPTIONS, strict=True))
                ]
            )
        elif isinstance(metric, UserFrechet):
            metric.features(images)


def identity_of(file: UserFile) -> dict[str, Any]:
    """Return the hashes of the file and of the files beside it that it imports."""
    beside = {path.name: sha256(path) for path in file.neighbours()}
    return {"file": sha256(file.path), **({"beside": beside} if beside else {})}


class UserScore(ImageMetric):
    """The scores of a user's file, checked: finite numbers, one per image, the same names every time."""

    def __init__(self, file: UserFile) -> None:
        self.file, self.path = file, file.path
        self.source = f"score() of {self.path.name} (sha256 {sha256(self.path)[:12]})"
        self.names = ()  # known once something has been scored

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.file)

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images = _stacked(self.path, [picture.image for picture in pictures])
        found = self.file.call("score", images, [picture.caption for picture in pictures])
        if not isinstance(found, Mapping) or not found:
            raise UserError(
                f"score() of {self.path} returned {type(found).__name__}, "
                "expected a dict of arrays with at least one"
            )
        values = {
            self._name(name): self._checked(name, value, len(pictures)) for name, value in found.items()
        }
        if self.names and tuple(values) != self.names:
            raise UserError(
                f"score() of {self.path} returned {', '.join(values)} where it returned "
                f"{', '.join(self.names)} before"
            )
        self.names = tuple(values)
        return values

    def _name(self, name: Any) -> str:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise UserError(
                f"score() of {self.path} returned a score named {name!r}; a name is a word or a few, "
                "in letters that can be printed"
            )
        return str(name)

    def _checked(self, name: str, value: Any, count: int) -> Values:
        """Return one score of all images, checked."""
        numbers = _numbers(value)
        if numbers is None:
            raise UserError(f"score() of {self.path}: '{name}' is no array of numbers but {_what(value)}")
        if numbers.shape != (count,):
            raise UserError(
                f"score() of {self.path}: '{name}' has shape {numbers.shape} for {count} images, "
                f"expected ({count},)"
            )
        if not np.isfinite(numbers).all():
            raise UserError(
                f"score() of {self.path}: '{name}' is not finite for image "
                f"{int(np.argmin(np.isfinite(numbers)))}"
            )
        return numbers


class UserFrechet(FrechetDistance):
    """A Fréchet distance on the features of a user's file."""

    name = "frechet"

    def __init__(self, file: UserFile) -> None:
        self.file, self.path = file, file.path
        self.source = f"Fréchet distance on features() of {self.path.name} (sha256 {sha256(self.path)[:12]})"

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.file)

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        returned = self.file.call("features", _stacked(self.path, images))
        found = _numbers(returned)
        if found is None:
            raise UserError(f"features() of {self.path} returned no array of numbers but {_what(returned)}")
        if found.ndim != 2 or len(found) != len(images) or not found.shape[1] or not np.isfinite(found).all():
            raise UserError(
                f"features() of {self.path} returned shape {found.shape} for {len(images)} images, "
                f"expected ({len(images)}, D), finite"
            )
        return found


def _numbers(value: Any) -> Values | None:
    """Return what a user's function returned as an array; None if it is not real numbers.

    Tensors may lie on any device.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu().double().numpy()
        found = np.asarray(value)
        return found.astype(np.float64) if found.dtype.kind in "biuf" else None
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _what(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return f"{type(value).__name__} {shown if len(shown) < 80 else f'{shown[:80]} …'}"


def _stacked(path: Path, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the images as one array (n, H, W, 3). Raises UserError if their sizes differ."""
    sizes = sorted({image.shape for image in images})
    if len(sizes) > 1:
        raise UserError(
            f"--scorer {path} is given images of one size, and these have {len(sizes)}: "
            f"{sizes[0]} and {sizes[1]} among them"
        )
    return np.stack(images)
