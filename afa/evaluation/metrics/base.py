"""What every metric is: a value for every picture, or one for a whole set of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from afa.evaluation.pictures import Picture

Values = NDArray[np.float64]


class Metric(ABC):
    """What image and set metrics share.

    source: weights, preprocessing and paper, in a sentence. identity: everything that a value depends on besides the
    pictures, above all the weights' hashes; what was computed under another identity is computed anew.
    """

    higher_is_better: ClassVar[bool] = True
    source: str = ""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON that changes whenever values would."""


class ImageMetric(Metric):
    """A value for every picture. names: of the scores it gives; the first is the metric's own."""

    names: tuple[str, ...]

    @abstractmethod
    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        """n pictures -> (n,) values for every name."""


class SetMetric(Metric):
    """A value for a set of pictures, computed from their features.

    needs_reference: whether real images are compared with. Features are kept, so that they are computed once.
    """

    name: str
    needs_reference: ClassVar[bool] = True

    @abstractmethod
    def features(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.floating]:
        """n images (H, W, 3) -> (n, D)."""

    @abstractmethod
    def value(self, features: NDArray[np.floating], reference: Any) -> float:
        """features (n, D), what `prepare` made of the reference's (None without one) -> the value."""

    def prepare(self, reference: NDArray[np.floating]) -> Any:
        """What `value` needs of the reference features (m, D), computed once."""
        return reference

    def replicates(self, features: NDArray[np.floating], groups: NDArray[np.int64], reference: Any, draws: NDArray[np.int64]) -> Values:
        """The value under resampled prompts: (R,).

        groups (n,): the prompt of each image, counted from 0. draws (R, prompts): prompts drawn with replacement; all
        images of a drawn prompt come along.
        """
        members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
        chosen = (np.concatenate([members[group] for group in draw]) for draw in draws)
        return np.asarray([self.value(features[indices], reference) for indices in chosen])
