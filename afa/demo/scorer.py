"""The exact scorer: which of a caption's six attributes does a picture show?

A small convolutional network, trained on degraded renders only and fixed before any method was compared, names the shape
and colour at each of the four places, the texture and the ground. Two shapes, two colours, one texture, one ground:
six attributes of each picture are right or wrong.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afa.demo.scenes import CENTRES, COLOURS, GROUNDS, SHAPES, TEXTURES, Scene, parse

PLACES = tuple(CENTRES)
CLASSES: dict[str, tuple[str, ...]] = {  # what the network names -> its possible answers
    **{f"shape {place}": ("none", *SHAPES) for place in PLACES},
    **{f"colour {place}": ("none", *COLOURS) for place in PLACES},
    "texture": tuple(TEXTURES),
    "ground": tuple(GROUNDS),
}


def labels(scenes: list[Scene]) -> Tensor:
    """The right answers: (n, 10) int64, columns as CLASSES; 0 where no object stands."""
    rows = []
    for scene in scenes:
        truth = {"texture": scene.texture, "ground": scene.ground}
        for place, thing in scene.places.items():
            truth |= {f"shape {place}": thing.shape, f"colour {place}": thing.colour}
        rows.append([answers.index(truth.get(question, "none")) for question, answers in CLASSES.items()])
    return torch.tensor(rows)


def network() -> nn.Sequential:
    """The scorer's network: images (B, 3, 64, 64) in [-1, 1] -> logits of all CLASSES, one after another."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
    layers += [nn.Conv2d(96, 32, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 8 * 8, 128), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(128, sum(map(len, CLASSES.values()))))


def answers(logits: Tensor) -> tuple[Tensor, ...]:
    """Logits of each question of CLASSES."""
    return logits.split([len(answers) for answers in CLASSES.values()], 1)


class AttributeScorer:
    """Judges pictures by their captions."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> "AttributeScorer":
        from safetensors.torch import load_file

        net = network()
        net.load_state_dict(load_file(path))
        return cls(net)

    def score(self, images: NDArray[np.uint8], captions: list[str]) -> dict[str, NDArray[np.float64]]:
        """images (n, 64, 64, 3) uint8, n captions -> values in [0, 1], one a picture.

        attributes: share of the six that are right; shapes, colours (share of two), texture, ground; all: 1 if all six are.
        """
        truth = labels([parse(caption) for caption in captions])
        logits = answers(self._run(images, self.net))
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
        """Penultimate features (n, 128), for a Fréchet distance between sets of pictures."""
        assert isinstance(self.net, nn.Sequential)
        features: NDArray[np.float32] = self._run(images, self.net[:-1]).numpy()
        return features

    @torch.no_grad()
    def _run(self, images: NDArray[np.uint8], net: nn.Module) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return torch.cat([net(batch.float() / 127.5 - 1) for batch in pixels.split(256)])
