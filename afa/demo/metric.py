"""Metrics of the embedded worlds, attribute accuracy and Fréchet distance, and their rewards.

A reward says how certain a network is that an image shows its caption. It is not the scorer, which judges:
it is another network, trained with another seed on other scenes with other degradations (above all blends and
blurs). So the scorer can judge what training has made of this reward.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afa.demo.scorer import answers_of
from afa.demo.worlds import FAR, NEAR, World, load_scorer
from afa.errors import UserError
from afa.files import sha256
from afa.metrics.base import Features, ImageMetric, Picture, SetMetric, Values
from afa.metrics.frechet import FrechetDistance
from afa.metrics.registry import Resources


class SceneScores(ImageMetric):
    """What a world's scorer says of an image and its caption; see afa.demo.scorer.

    scores: name of a value -> the scorer's name of it; the first leads
    """

    source = (
        "the embedded world's classifier, trained on degraded renders and fixed before any method was "
        "compared"
    )

    def __init__(self, world: World, scores: Mapping[str, str]) -> None:
        self.world, self.scores = world, scores
        self.names = tuple(scores)

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": sha256(self.world.file("scorer")), "scores": self.scores}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images = np.stack([picture.image for picture in pictures])
        try:
            found = load_scorer(self.world).score(images, [picture.caption for picture in pictures])
        except ValueError as error:
            raise UserError(
                f"metric '{self.names[0]}' judges scenes of the {self.world.name} world only: {error}"
            ) from None
        return {name: found[part] for name, part in self.scores.items()}


class Frechet(FrechetDistance):
    """The Fréchet distance to real renders, on features of the scorer."""

    source = (
        "Fréchet distance to real mixed scenes on the classifier's features; "
        "biased upward by few images, equally for all methods"
    )

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": sha256(self.world.file("scorer"))}

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return load_scorer(self.world).features(np.stack(images))


def make(resources: Resources) -> ImageMetric:
    """Make attribute accuracy of the far world. Raises UserError for weights: its own are shipped."""
    return _attributes(FAR, "attributes", resources)


def make_near(resources: Resources) -> ImageMetric:
    """Make attribute accuracy of the near world, as `make` does."""
    return _attributes(NEAR, "near_attributes", resources)


def make_near_probability(resources: Resources) -> ImageMetric:
    """Make the probability of attributes of the near world, as `make` does."""
    return SceneScores(NEAR, {_without_weights("near_probability", resources): "probability"})


def _attributes(world: World, name: str, resources: Resources) -> ImageMetric:
    parts = [score for score in world.scores if score not in ("attributes", "probability")]
    return SceneScores(
        world, {_without_weights(name, resources): "attributes"} | {part: part for part in parts}
    )


def frechet(resources: Resources) -> SetMetric:
    """Make the far world's Fréchet distance. Raises UserError for weights: its own are shipped."""
    return Frechet(FAR, _without_weights("frechet", resources))


def near_frechet(resources: Resources) -> SetMetric:
    """Make the near world's Fréchet distance, as `frechet` does."""
    return Frechet(NEAR, _without_weights("near_frechet", resources))


def _without_weights(name: str, resources: Resources) -> str:
    """Return the metric's name. Raises UserError if the user gave weights for it."""
    if resources.weights is not None:
        raise UserError(
            f"metric '{name}' brings its own weights; leave out --metric-weights {name}={resources.weights}"
        )
    return name


FLOOR = -6.0  # log-probability below which an attribute is no worse


class SceneReward:
    """The mean log-probability of a caption's attributes, from FLOOR (all absent) to 0 (all certain)."""

    def __init__(self, net: nn.Module, world: World, name: str) -> None:
        self.net, self.world, self.name = net.eval().requires_grad_(False), world, name

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return rewards (B,) with gradients, for images (B, 3, 64, 64) about [-1, 1].

        Raises UserError for a caption that is not of this world.
        """
        try:
            truth = self.world.labels([self.world.parse(caption) for caption in captions]).to(images.device)
        except ValueError as error:
            raise UserError(
                f"reward '{self.name}' judges scenes of the {self.world.name} world only: {error}"
            ) from None
        found = [
            answer.log_softmax(1).gather(1, truth[:, k : k + 1])[:, 0]
            for k, answer in enumerate(answers_of(self.net(images), self.world.classes))
        ]
        # What the caption names, and the texture and the ground.
        asked = torch.cat([truth[:, :-2] > 0, torch.ones_like(truth[:, -2:], dtype=torch.bool)], 1)
        return (torch.stack(found, 1).clamp(min=FLOOR) * asked).sum(1) / asked.sum(1)


def load(device: torch.device) -> SceneReward:
    """Load the far world's reward."""
    return SceneReward(FAR.load_reward().to(device), FAR, "scenes")


def load_near(device: torch.device) -> SceneReward:
    """Load the near world's reward."""
    return SceneReward(NEAR.load_reward().to(device), NEAR, "near")
