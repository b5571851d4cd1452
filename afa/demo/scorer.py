"""The far world's scorer: which of a caption's six attributes does an image show?

A small convolutional network predicts the shape and colour at each of four places, the texture and the
ground. It was trained on degraded renders only, and fixed before any method was compared. An image has six
attributes, right or wrong: two shapes, two colours, one texture, one ground.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afa.demo.drawing import COLOURS, GROUNDS, TEXTURES
from afa.demo.scenes import CENTRES, SHAPES, Scene, parse

SCORES = ("attributes", "shapes", "colours", "texture", "ground", "all")
PLACES = tuple(CENTRES)
CLASSES: dict[str, tuple[str, ...]] = {  # what the network names -> its possible answers
    **{f"shape {place}": ("none", *SHAPES) for place in PLACES},
    **{f"colour {place}": ("none", *COLOURS) for place in PLACES},
    "texture": tuple(TEXTURES),
    "ground": tuple(GROUNDS),
}


def labels(scenes: list[Scene]) -> Tensor:
    """Return the true classes: (n, 10) int64, columns as in CLASSES; 0 if there is no object."""
    rows = []
    for scene in scenes:
        truth = {"texture": scene.texture, "ground": scene.ground}
        for place, thing in scene.places.items():
            truth |= {f"shape {place}": thing.shape, f"colour {place}": thing.colour}
        rows.append([answers.index(truth.get(question, "none")) for question, answers in CLASSES.items()])
    return torch.tensor(rows)


def network() -> nn.Sequential:
    """Make the scorer's network: images (B, 3, 64, 64) in [-1, 1] to the logits of all CLASSES."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
    layers += [nn.Conv2d(96, 32, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 8 * 8, 128), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(128, sum(map(len, CLASSES.values()))))


def reward_network() -> nn.Sequential:
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


def answers_of(logits: Tensor, classes: Mapping[str, Sequence[str]]) -> tuple[Tensor, ...]:
    """Split logits (B, all answers) by the questions of some classes."""
    return logits.split([len(options) for options in classes.values()], 1)


@torch.no_grad()
def run_batches(images: NDArray[np.uint8], run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a network on images (n, 64, 64, 3) uint8; it is given (B, 3, 64, 64) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return torch.cat([run(batch.float() / 127.5 - 1) for batch in pixels.split(256)])


class AttributeScorer:
    """Judges images by their captions."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)

    def score(self, images: NDArray[np.uint8], captions: list[str]) -> dict[str, NDArray[np.float64]]:
        """Return values (n,) in [0, 1] by name.

        images:   (n, 64, 64, 3) uint8
        captions: n
        attributes is the share of the six that are right, shapes and colours are shares of two, texture and
        ground are 0 or 1, and all is 1 if all six are right.
        """
        truth = labels([parse(caption) for caption in captions])
        logits = answers_of(run_batches(images, self.net), CLASSES)
        right = torch.stack([answer.argmax(1) == truth[:, k] for k, answer in enumerate(logits)], 1).double()
        asked = truth[:, :8] > 0  # two shapes and two colours a picture
        parts = {
            "shapes": (right[:, :4] * asked[:, :4]).sum(1) / 2,
            "colours": (right[:, 4:8] * asked[:, 4:]).sum(1) / 2,
            "texture": right[:, 8],
            "ground": right[:, 9],
        }
        share = (2 * parts["shapes"] + 2 * parts["colours"] + parts["texture"] + parts["ground"]) / 6
        return {
            name: value.numpy()
            for name, value in {"attributes": share, **parts, "all": (share > 0.999).double()}.items()
        }

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return features (n, 128) before the last layer, for a Fréchet distance between sets of images."""
        assert isinstance(self.net, nn.Sequential)
        features: NDArray[np.float32] = run_batches(images, self.net[:-1]).numpy()
        return features
