"""What a metric is, and pictures and features that are read once."""

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
    """What an image is, whoever made it: the hash of its shape and pixels."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()


class Memo:
    """The last `limit` rows, by key."""

    def __init__(self, limit: int = 20_000) -> None:
        self.limit = limit
        self.known: OrderedDict[object, Row] = OrderedDict()

    def rows(
        self, keys: Sequence[object], compute: Callable[[list[int]], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """One row a key, (n, D); compute(places) -> rows of those places that are not known yet, each key once."""
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
    """One image and what it was asked to show.

    image: (H, W, 3) uint8. caption: its prompt. group: index of the prompt; images of one prompt share it.
    reference: a real image of the same caption, (H', W', 3) uint8, where the protocol has one.
    """

    image: NDArray[np.uint8]
    caption: str
    group: int
    reference: NDArray[np.uint8] | None = None


Values = NDArray[np.float64]
Features = NDArray[np.floating]
Indices = NDArray[np.int64]


class Metric(ABC):
    """What image and set metrics share. Whoever makes one finds its weights; one that exists can be used.

    source: weights, preprocessing and paper, in a sentence. identity: everything that its numbers depend on besides the
    pictures, above all the weights' hashes; what was computed under another identity is computed anew.
    """

    higher_is_better: ClassVar[bool] = True
    source: str = ""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON that changes whenever values would; of a set metric: whenever its features would, so equal ones are shared."""


class ImageMetric(Metric):
    """A value for every picture. names: of the scores it gives; the first is the metric's own."""

    names: tuple[str, ...]

    @abstractmethod
    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        """n pictures -> (n,) values for every name."""


class Differentiable(ABC):
    """A metric that can also be a reward in training: its value with gradients to the pixels."""

    @abstractmethod
    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) about [-1, 1], captions -> (B,), what score() says of them but for the rounding to 8 bits."""


class SetMetric(Metric):
    """A value for a set of pictures, computed from their features.

    needs_reference: whether real images are compared with. Features are kept, so that they are computed once.
    """

    name: str
    needs_reference: ClassVar[bool] = True

    @abstractmethod
    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        """n images (H, W, 3) -> (n, D)."""

    @abstractmethod
    def value(self, features: Features, reference: Any) -> float:
        """features (n, D), what `prepare` made of the reference's (None without one) -> the value."""

    def prepare(self, reference: Features) -> Any:
        """What `value` needs of the reference features (m, D), computed once."""
        return reference

    def replicates(self, features: Features, groups: Indices, reference: Any, draws: Indices) -> Values:
        """The value under resampled prompts: (R,).

        groups (n,): the prompt of each image, counted from 0. draws (R, prompts): prompts drawn with replacement; all
        images of a drawn prompt come along, as often as it was drawn. This is the definition; metrics have faster ways.
        """
        return np.asarray(
            [self.value(np.repeat(features, times, axis=0), reference) for times in copies(groups, draws)]
        )


def copies(groups: Indices, draws: Indices) -> Iterator[Indices]:
    """How often each image is drawn, draw by draw: (n,) each; arguments as for `replicates`."""
    for draw in draws:
        yield np.bincount(draw, minlength=draws.shape[1])[groups]


def batches(items: Any, size: int) -> Iterator[Any]:
    """A sequence, or the rows of an array, in parts of at most that many."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
