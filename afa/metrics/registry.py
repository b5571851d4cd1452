"""The registry of metrics: one entry says how a metric is made and what it measures."""

from dataclasses import dataclass
from typing import Any

from afa.errors import UserError, unknown
from afa.lazy import load


@dataclass(frozen=True)
class MetricEntry:
    """One metric.

    make:   "module:function" with function(Resources) -> Metric; imported when the metric is asked for
    help:   one line for `--metrics list` and the docs
    reward: whether it is Differentiable, so that `afa train --reward` offers it
    """

    make: str
    help: str
    reward: bool = False


METRICS = {
    "attributes": MetricEntry(
        "afa.demo.metric:make",
        "Attribute accuracy: the share of a scene's six attributes that the far world's scorer finds.",
    ),
    "near_attributes": MetricEntry(
        "afa.demo.metric:make_near",
        "Attribute accuracy: the share of a scene's 5 to 11 attributes that the near world's scorer finds.",
    ),
    "near_probability": MetricEntry(
        "afa.demo.metric:make_near_probability",
        "The mean probability that the near world's scorer gives to the same attributes.",
    ),
    "frechet": MetricEntry(
        "afa.demo.metric:frechet",
        "Fréchet distance to real scenes, on features of the far world's scorer.",
    ),
    "near_frechet": MetricEntry(
        "afa.demo.metric:near_frechet",
        "Fréchet distance to real scenes, on features of the near world's scorer.",
    ),
    "fid": MetricEntry(
        "afa.metrics.frechet:make_fid",
        "FID: the Fréchet distance to real images on Inception features.",
    ),
    "kid": MetricEntry(
        "afa.metrics.mmd:make_kid",
        "KID: the kernel distance to real images on Inception features; unbiased, so set sizes may differ.",
    ),
    "inception_score": MetricEntry(
        "afa.metrics.inception:make_inception_score",
        "Inception score: does every image show one thing, and do they show many things? No real images.",
    ),
    "cmmd": MetricEntry(
        "afa.metrics.mmd:make_cmmd",
        "CMMD: the kernel distance to real images on CLIP embeddings; steady for a few thousand images.",
    ),
    "fd_dinov2": MetricEntry(
        "afa.metrics.frechet:make_fd_dinov2",
        "FD-DINOv2: the Fréchet distance on DINOv2 features, closer to people's judgement than FID.",
    ),
    "clip_t": MetricEntry(
        "afa.metrics.clip_scores:make_clip_t",
        "CLIP-T: does the image fit its prompt? The cosine of their CLIP embeddings.",
        reward=True,
    ),
    "clip_i": MetricEntry(
        "afa.metrics.clip_scores:make_clip_i",
        "CLIP-I: is the image like the real one of the same caption? The cosine of their CLIP embeddings.",
    ),
    "aesthetic": MetricEntry(
        "afa.metrics.clip_scores:make_aesthetic",
        "Aesthetic score: how much people would like the image, about 1 to 10, whatever its prompt.",
        reward=True,
    ),
    "pickscore": MetricEntry(
        "afa.metrics.clip_scores:make_pickscore",
        "PickScore: which of two images of a prompt would people pick? A CLIP trained on their choices.",
        reward=True,
    ),
    "hpsv2": MetricEntry(
        "afa.metrics.clip_scores:make_hpsv2",
        "HPSv2: how would people rank the image among others of its prompt? A CLIP trained on rankings.",
        reward=True,
    ),
    "imagereward": MetricEntry(
        "afa.metrics.imagereward:make_imagereward",
        "ImageReward: how much people would like the image as an answer to its prompt; standardised.",
        reward=True,
    ),
    "lpips": MetricEntry(
        "afa.metrics.lpips:make_lpips",
        "LPIPS diversity: how different the images of one prompt look, as a mean perceptual distance.",
    ),
}

OWN_REWARDS = {"scenes": "afa.demo.metric:load", "near": "afa.demo.metric:load_near"}
# rewards that are no metrics: "module:function(device)"


def rewards() -> list[str]:
    """Return the names of all rewards of training."""
    return [*OWN_REWARDS, *(name for name, entry in METRICS.items() if entry.reward)]


@dataclass(frozen=True)
class Resources:
    """What a metric is made with.

    weights:    paths of its parts (see weights.find); None: its defaults
    device:     computes the metric
    batch_size: images at a time
    """

    weights: str | None
    device: Any
    batch_size: int = 16


def make_metric(name: str, resources: Resources, flag: str | None = None) -> Any:
    """Return a metric by name, with its weights found and checked.

    flag: of the command, that gives the place of the weights; None: --metric-weights NAME=
    Raises UserError for an unknown name, or if weights are missing.
    """
    if name not in METRICS:
        raise UserError(unknown(name, METRICS, "metric"))
    try:
        return load(METRICS[name].make)(resources)
    except UserError as error:
        if flag is None:
            raise
        raise UserError(str(error).replace(f"--metric-weights {name}=", f"{flag} ")) from None
