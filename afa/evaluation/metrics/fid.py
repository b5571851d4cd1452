"""FID: the Fréchet inception distance, how far images as a whole are from real ones.

Source: Heusel et al., arXiv:1706.08500. Deviation: none; it grows as there are fewer images, equally for all methods.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.evaluation.metrics.base import Features
from afa.evaluation.metrics.frechet import FrechetDistance
from afa.evaluation.metrics.inception_features import InceptionFeatures, inception_features
from afa.evaluation.metrics.table import Resources


class FrechetInceptionDistance(FrechetDistance):
    """The Fréchet distance on Inception features. 0 and above, lower is better."""

    name = "fid"

    def __init__(self, extract: InceptionFeatures, batch_size: int) -> None:
        self.extract, self.batch_size = extract, batch_size
        self.source = f"Fréchet distance on {extract.source}; arXiv:1706.08500"

    @property
    def identity(self) -> dict[str, Any]:
        return self.extract.identity

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return self.extract(images, self.batch_size)


def make(resources: Resources) -> FrechetInceptionDistance:
    """FID with its weights. Raises UserError if they are missing."""
    return FrechetInceptionDistance(inception_features("fid", resources), resources.batch_size)
