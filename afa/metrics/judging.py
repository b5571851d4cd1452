"""One score for each prompt, by which a search or a calibration chooses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from afa.devices import choose_device
from afa.errors import UserError
from afa.metrics.base import ImageMetric, Picture
from afa.metrics.registry import Resources, make_metric
from afa.metrics.user import load_scorer
from afa.prompts import prompt_numbers
from afa.stats import prompt_means


def image_metric(
    name: str, weights: str | None, scorer: str | None, device: str | None, batch_size: int
) -> ImageMetric:
    """Return what judges each image: a metric by name, or the scores of a user's file.

    weights, scorer, device, batch_size: options of the command
    Raises UserError for missing weights, a scorer that cannot be used, and metrics of sets of images.
    """
    if scorer is not None:
        own = load_scorer(Path(scorer))[0]
    else:
        own = make_metric(name, Resources(weights, choose_device(device), batch_size))
    if not isinstance(own, ImageMetric):
        raise UserError(
            f"--metric {name} is one value for a set of images; choose one that judges each image"
        )
    return own


def prompt_scores(
    metric: ImageMetric, images: Sequence[NDArray[np.uint8]], captions: Sequence[str]
) -> list[float]:
    """Return the mean score of every prompt, with the sign that makes higher better.

    images:   n × (H, W, 3)
    captions: their prompts; equal ones are one prompt
    Raises UserError for a score that is no finite number.
    """
    numbers = prompt_numbers(captions)
    pictures = [Picture(*one) for one in zip(images, captions, numbers, strict=True)]
    name, scores = next(iter(metric.score(pictures).items()))
    if not np.isfinite(scores).all():
        prompt = captions[int(np.argmin(np.isfinite(scores)))]
        raise UserError(
            f"'{name}' of an image for '{prompt}' is no finite number; nothing can be chosen by it"
        )
    sign = 1 if metric.higher_is_better else -1
    return [sign * float(value) for value in prompt_means(scores, numbers)]
