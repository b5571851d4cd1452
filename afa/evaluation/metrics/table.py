"""The table of metrics."""

import importlib
from dataclasses import dataclass
from typing import Any

from afa.errors import UserError
from afa.lookup import look_up

# name -> module with `make(resources) -> Metric`, imported when asked for. A metric may live beside its data.
METRICS: dict[str, str] = {
    "attributes": "afa.demo.metric",
    "frechet": "afa.demo.metric:frechet",
    "fid": "afa.evaluation.metrics.fid",
    "kid": "afa.evaluation.metrics.kid",
    "inception_score": "afa.evaluation.metrics.inception_score",
    "cmmd": "afa.evaluation.metrics.cmmd",
    "fd_dinov2": "afa.evaluation.metrics.fd_dinov2",
    "clip_t": "afa.evaluation.metrics.clip_t",
    "clip_i": "afa.evaluation.metrics.clip_i",
    "aesthetic": "afa.evaluation.metrics.aesthetic",
    "pickscore": "afa.evaluation.metrics.pickscore",
    "hpsv2": "afa.evaluation.metrics.hpsv2",
    "imagereward": "afa.evaluation.metrics.imagereward",
    "lpips": "afa.evaluation.metrics.lpips",
}


@dataclass(frozen=True)
class Resources:
    """What a metric is made with. weights: the places given for its parts (see weights.find), None for its defaults."""

    weights: str | None
    device: Any
    batch_size: int = 16


def make_metric(name: str, resources: Resources) -> Any:
    """A metric by name, its weights found and checked. Raises UserError for an unknown name or weights that are missing."""
    try:
        place = look_up(name, METRICS, "metric")
    except ValueError as error:
        raise UserError(str(error)) from None
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function or "make")(resources)
