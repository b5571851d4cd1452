"""The near world's scorer: which of a caption's attributes does an image show, wherever in the image?

A small convolutional network says, for each of the eight colours, which shape and which size a thing of this
colour has, and the texture and the ground. It was trained on degraded renders only, and fixed before any
method was compared. Places are not judged. The scorer and the reward are networks of one form.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afa.demo.drawing import COLOURS, GROUNDS, TEXTURES
from afa.demo.near_scenes import SHAPES, SIZES, NearScene, parse
from afa.demo.scorer import answers_of, run_batches

SCORES = ("probability", "attributes", "shapes", "sizes", "colours", "texture", "ground", "all")
CLASSES: dict[str, tuple[str, ...]] = {  # what the network names -> its possible answers
    **{f"shape of {colour}": ("none", *SHAPES) for colour in COLOURS},
    **{f"size of {colour}": ("none", *SIZES) for colour in COLOURS},
    "texture": tuple(TEXTURES),
    "ground": tuple(GROUNDS),
}
N = len(COLOURS)


def labels(scenes: list[NearScene]) -> Tensor:
    """Return the true classes: (n, 18) int64, columns as in CLASSES; 0 if nothing has the colour."""
    rows = []
    for scene in scenes:
        truth = {"texture": scene.texture, "ground": scene.ground}
        for thing in scene.things:
            truth |= {f"shape of {thing.colour}": thing.shape, f"size of {thing.colour}": thing.size}
        rows.append([options.index(truth.get(question, "none")) for question, options in CLASSES.items()])
    return torch.tensor(rows)


class SceneNetwork(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] to the logits of all CLASSES: the largest over all places."""

    def __init__(self, width: int = 24, kernel: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 3 * width)):
            layers += [nn.Conv2d(before, after, kernel, 2, kernel // 2), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(3 * width, 3 * width, 3, 1, 1), nn.GroupNorm(8, 3 * width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.Conv2d(3 * width, sum(map(len, CLASSES.values())), 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.trunk(images)).amax((2, 3))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return what the image shows, (B, 2 × 3 × width): the trunk's mean and largest value over places."""
        maps = self.trunk(images)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)


class NearScorer:
    """Judges images of the near world by their captions."""

    def __init__(self, net: SceneNetwork) -> None:
        self.net = net.eval().requires_grad_(False)

    def score(self, images: NDArray[np.uint8], captions: list[str]) -> dict[str, NDArray[np.float64]]:
        """Return values (n,) in [0, 1] by name.

        images:   (n, 64, 64, 3) uint8
        captions: n
        shapes, sizes and colours are the shares of the caption's things that are right (a colour is right if
        anything has it), texture and ground are 0 or 1. attributes is the share of all attributes that are
        right, three a thing and two for the background, and all is 1 if all are right. probability is the
        mean probability of the same attributes: the network's certainty counts, not only its answer.
        """
        truth = labels([parse(caption) for caption in captions])
        answers = answers_of(run_batches(images, self.net), CLASSES)
        likely = [answer.double().softmax(1) for answer in answers]
        chance = [each.gather(1, column[:, None])[:, 0] for each, column in zip(likely, truth.T, strict=True)]
        found = torch.stack([answer.argmax(1) for answer in answers], 1)
        asked = (truth[:, :N] > 0).double()
        parts = _parts((found == truth).double(), (found[:, :N] > 0).double(), asked)
        somewhere = torch.stack([1 - each[:, 0] for each in likely[:N]], 1)  # that a thing has the colour
        share = _share(parts, asked)
        values = {"attributes": share, **parts, "all": (share > 0.999).double()}
        values["probability"] = _share(_parts(torch.stack(chance, 1), somewhere, asked), asked)
        return {name: value.numpy() for name, value in values.items()}

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return features (n, 144), for a Fréchet distance between sets of images."""
        features: NDArray[np.float32] = run_batches(images, self.net.features).numpy()
        return features


def _parts(right: Tensor, seen: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """Return the shares of what is right, each (n,).

    right: (n, 18) of each question
    seen:  (n, N) whether a thing has a colour
    asked: (n, N) 1 for the colours that the caption names
    """
    things = asked.sum(1)
    return {
        "shapes": (right[:, :N] * asked).sum(1) / things,
        "sizes": (right[:, N : 2 * N] * asked).sum(1) / things,
        "colours": (seen * asked).sum(1) / things,
        "texture": right[:, -2],
        "ground": right[:, -1],
    }


def _share(parts: dict[str, Tensor], asked: Tensor) -> Tensor:
    """Return the share of all attributes, three a thing and two for the background: (n,)."""
    things = asked.sum(1)
    of_things = (parts["shapes"] + parts["sizes"] + parts["colours"]) * things
    return (of_things + parts["texture"] + parts["ground"]) / (3 * things + 2)


def network() -> SceneNetwork:
    """Make the scorer's network."""
    return SceneNetwork()


def reward_network() -> SceneNetwork:
    """Make the reward's network: another width and kernel than the scorer's."""
    return SceneNetwork(width=16, kernel=5)
