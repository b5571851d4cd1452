"""Metrics of the embedded world, attribute accuracy and Fréchet distance, and its reward.

The reward says how certain a network is that an image shows its caption. It is not the scorer, which judges:
it is another kind of network, trained with another seed on other scenes with other degradations (above all
blends and blurs). So the scorer can judge what training has made of this reward.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afa.demo.data import REWARD, SCORER
from afa.demo.scenes import parse
from afa.demo.scorer import CLASSES, AttributeScorer, answers, labels
from afa.errors import UserError
from afa.files import sha256
from afa.metrics.base import Features, ImageMetric, Picture, SetMetric, Values
from afa.metrics.frechet import FrechetDistance
from afa.metrics.registry import Resources


@lru_cache(maxsize=1)
def _scorer() -> AttributeScorer:
    return AttributeScorer.load(SCORER)


class Attributes(ImageMetric):
    """The share of a caption's six attributes that an image shows, and its parts; see afa.demo.scorer."""

    names = ("attributes", "shapes", "colours", "texture", "ground", "all")
    source = (
        "the embedded world's classifier, trained on degraded renders and fixed before any method was "
        "compared"
    )

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": sha256(SCORER)}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images = np.stack([picture.image for picture in pictures])
        try:
            return _scorer().score(images, [picture.caption for picture in pictures])
        except ValueError as error:
            raise UserError(
                f"metric 'attributes' judges scenes of the embedded world only: {error}"
            ) from None


class Frechet(FrechetDistance):
    """The Fréchet distance to real renders, on the 128 features before the scorer's last layer."""

    name = "frechet"
    source = (
        "Fréchet distance to real mixed scenes on the classifier's 128 features; "
        "biased upward by few images, equally for all methods"
    )

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": sha256(SCORER)}

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return _scorer().features(np.stack(images))


def make(resources: Resources) -> ImageMetric:
    """Make attribute accuracy; its weights are shipped. Raises UserError if others are given."""
    _refuse_weights("attributes", resources)
    return Attributes()


def frechet(resources: Resources) -> SetMetric:
    """Make the Fréchet distance; its weights are shipped. Raises UserError if others are given."""
    _refuse_weights("frechet", resources)
    return Frechet()


def _refuse_weights(name: str, resources: Resources) -> None:
    if resources.weights is not None:
        raise UserError(
            f"metric '{name}' brings its own weights; leave out --metric-weights {name}={resources.weights}"
        )


ASKED = 6  # attributes of a caption
FLOOR = -6.0  # log-probability below which an attribute is no worse


def network() -> nn.Sequential:
    """Make the reward's network: images (B, 3, 64, 64) in [-1, 1] to the logits of all CLASSES."""
    layers: list[nn.Module] = []
    for before, after in ((3, 24), (24, 48), (48, 72), (72, 96)):
        layers += [
            nn.Conv2d(before, after, 5 if before == 3 else 3, padding="same"),
            nn.GELU(),
            nn.AvgPool2d(2),
        ]
        layers += [nn.GroupNorm(1, after)]
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(96 * 4 * 4, 160),
        nn.GELU(),
        nn.Linear(160, sum(map(len, CLASSES.values()))),
    )


class SceneReward:
    """The mean log-probability of a caption's six attributes, from FLOOR (all absent) to 0 (all certain)."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return rewards (B,) with gradients, for images (B, 3, 64, 64) about [-1, 1].

        Raises UserError for a caption that is not of the embedded world.
        """
        try:
            truth = labels([parse(caption) for caption in captions]).to(images.device)
        except ValueError as error:
            raise UserError(f"reward 'scenes' judges scenes of the embedded world only: {error}") from None
        found = [
            answer.log_softmax(1).gather(1, truth[:, k : k + 1])[:, 0]
            for k, answer in enumerate(answers(self.net(images)))
        ]
        # Two shapes, two colours, the texture and the ground.
        asked = torch.cat([truth[:, :8] > 0, torch.ones_like(truth[:, 8:], dtype=torch.bool)], 1)
        return (torch.stack(found, 1).clamp(min=FLOOR) * asked).sum(1) / ASKED


def load(device: torch.device) -> SceneReward:
    """Load the shipped reward."""
    from safetensors.torch import load_file

    net = network()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(REWARD).items()})
    return SceneReward(net.to(device))
