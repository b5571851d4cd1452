"""The embedded world's own metrics: attribute accuracy by the exact scorer, and the Fréchet distance on its features."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.demo.scorer import AttributeScorer
from afa.demo.world import SCORER
from afa.errors import UserError
from afa.evaluation.metrics.base import Features, ImageMetric, SetMetric, Values
from afa.evaluation.metrics.frechet import FrechetDistance
from afa.evaluation.metrics.table import Resources
from afa.evaluation.pictures import Picture
from afa.files import sha256


@lru_cache(maxsize=1)
def _scorer() -> AttributeScorer:
    return AttributeScorer.load(SCORER)


class Attributes(ImageMetric):
    """Share of a caption's six attributes that a picture shows, and its parts; see afa.demo.scorer."""

    names = ("attributes", "shapes", "colours", "texture", "ground", "all")
    source = "the embedded world's classifier, trained on degraded renders and fixed before any method was compared"

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": sha256(SCORER)}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images = np.stack([picture.image for picture in pictures])
        try:
            return _scorer().score(images, [picture.caption for picture in pictures])
        except ValueError as error:
            raise UserError(f"metric 'attributes' judges scenes of the embedded world only: {error}") from None


class Frechet(FrechetDistance):
    """Fréchet distance to real renders, on the 128 features before the scorer's last layer."""

    name = "frechet"
    source = "Fréchet distance to real mixed scenes on the classifier's 128 features; biased upward by few images, equally for all methods"

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": sha256(SCORER)}

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return _scorer().features(np.stack(images))


def make(resources: Resources) -> ImageMetric:
    """Attribute accuracy; its weights are shipped. Raises UserError if others are given."""
    _refuse_weights("attributes", resources)
    return Attributes()


def frechet(resources: Resources) -> SetMetric:
    """The Fréchet distance; its weights are shipped. Raises UserError if others are given."""
    _refuse_weights("frechet", resources)
    return Frechet()


def _refuse_weights(name: str, resources: Resources) -> None:
    if resources.weights is not None:
        raise UserError(f"metric '{name}' brings its own weights; leave out --metric-weights {name}={resources.weights}")
