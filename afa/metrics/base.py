"""Base classes of metrics, and a memo of computed rows."""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Row = NDArray[np.float32]


def content_key(image: NDArray[np.uint8]) -> bytes:
    """Return the hash of an image's shape and pixels."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()


class Memo:
    """Keep the last `limit` computed rows by key."""

    def __init__(self, limit: int = 20_000) -> None:
        self.limit = limit
        self.known: OrderedDict[object, Row] = OrderedDict()

    def rows(
        self, keys: Sequence[object], compute: Callable[[list[int]], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Return one row per key, and compute the unknown ones.

        keys:    n hashable keys
        compute: takes the places of unknown keys (each key once) and returns their rows (m, D)
        Returns (n, D).
        """
        todo = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self.known}
        places = sorted(todo.values())
        new = dict(zip((keys[place] for place in places), compute(places) if places else (), strict=True))
        found = np.stack([new[key] if key in new else self.known[key] for key in keys])
        self.known.update(new)
        while len(self.known) > self.limit:
            self.known.popitem(last=False)
        return found


@dataclass(frozen=True)
class Picture:
    """One image and its prompt.

    image:     (H, W, 3) uint8
    caption:   its prompt
    group:     index of the prompt; images of one prompt share it
    reference: (H', W', 3) uint8, a real image of the same caption; None if the protocol has none
    """

    image: NDArray[np.uint8]
    caption: str
    group: int
    reference: NDArray[np.uint8] | None = None


Values = NDArray[np.float64]
Features = NDArray[np.floating]
Indices = NDArray[np.int64]


class Metric(ABC):
    """What image and set metrics share. Making a metric finds and checks its weights.

    source:   weights, preprocessing and paper, in one sentence
    identity: everything besides the images that its numbers depend on, above all the hashes of its weights;
              values computed under another identity are computed again
    """

    higher_is_better: ClassVar[bool] = True
    source: str = ""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON that changes when values would change.

        For a set metric it changes when features would change, so that metrics with equal features share
        them.
        """


class ImageMetric(Metric):
    """A metric with a value for each image.

    names: of its scores; the first one is the main score
    """

    names: tuple[str, ...]

    @abstractmethod
    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        """Return (n,) values for each name, from n pictures."""


class Differentiable(ABC):
    """A metric that can also be a reward in training: its value with gradients to the pixels."""

    @abstractmethod
    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the values of score(), without its rounding to 8 bits, with gradients to the pixels.

        images:   (B, 3, H, W), about [-1, 1]
        captions: B prompts
        Returns (B,).
        """


class SetMetric(Metric):
    """A metric with one value for a set of images, computed from their features.

    needs_reference: whether it compares with real images
    Features are stored, so that each image is computed once.
    """

    name: str
    needs_reference: ClassVar[bool] = True

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of its scores: its own."""
        return (self.name,)

    @abstractmethod
    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        """Return features (n, D) of n images (H, W, 3) uint8."""

    @abstractmethod
    def value(self, features: Features, reference: Any) -> float:
        """Return the value.

        features:  (n, D)
        reference: what `prepare` returned for the real images; None if there are none
        """

    def prepare(self, reference: Features) -> Any:
        """Return what `value` needs of the reference features (m, D); called once."""
        return reference

    def replicates(self, features: Features, groups: Indices, reference: Any, draws: Indices) -> Values:
        """Return the values under resampled prompts, (R,).

        groups: (n,) the prompt of each image, counted from 0
        draws:  (R, prompts) prompts drawn with replacement
        All images of a drawn prompt are taken, as often as the prompt was drawn. This is the definition;
        subclasses have faster ways.
        """
        return np.asarray(
            [self.value(np.repeat(features, times, axis=0), reference) for times in copies(groups, draws)]
        )


def copies(groups: Indices, draws: Indices) -> Iterator[Indices]:
    """Yield how often each image is drawn, (n,), for each draw. Arguments as in `replicates`."""
    for draw in draws:
        yield np.bincount(draw, minlength=draws.shape[1])[groups]


def batches(items: Any, size: int) -> Iterator[Any]:
    """Yield a sequence, or the rows of an array, in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
