"""LPIPS diversity: how different do the images of one prompt look? An image's mean distance to the others of its prompt.

Source of the distance: see perceptual.py. As diversity: Zhu et al., arXiv:1711.11586.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afa.errors import UserError
from afa.evaluation.metrics.base import ImageMetric, Values, batches
from afa.evaluation.metrics.perceptual import Perceptual, distance
from afa.evaluation.metrics.pixels import to_tensor
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find
from afa.evaluation.pictures import Picture

TRUNK = Part(
    "torchvision's AlexNet",
    "alexnet-owt-7be5be79.pth",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256=("7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", "397923af"),  # AlexNet, VGG16
)
LINEAR = Part(
    "LPIPS's linear weights 0.1",
    "alex.pth",
    url="https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth",
    sha256=(  # AlexNet's, VGG16's
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
)


class Diversity(ImageMetric):
    """0 for equal images, higher is more diverse; no judgement of how good they are. A prompt needs at least two images."""

    names = ("lpips",)

    def __init__(self, trunk: Found, linear: Found, batch_size: int, device: torch.device) -> None:
        self.trunk, self.linear, self.batch_size, self.device = trunk, linear, batch_size, device
        self.source = f"mean LPIPS to the other images of the prompt, by {trunk} and {linear}, images as they are; arXiv:1801.03924"
        self._perceptual = Perceptual(trunk.path, linear.path)

    @property
    def identity(self) -> dict[str, Any]:
        return {"trunk": self.trunk.identity, "linear": self.linear.identity}

    @cached_property
    def _network(self) -> Any:
        return self._perceptual.load(self.device)

    @torch.no_grad()
    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        prompts: dict[int, list[int]] = {}
        for place, picture in enumerate(pictures):
            prompts.setdefault(picture.group, []).append(place)
        for places in prompts.values():
            _check([pictures[place] for place in places])
        values = np.empty(len(pictures))
        for places in prompts.values():
            values[places] = self._means([pictures[place] for place in places])
        return {"lpips": values}

    def _means(self, pictures: Sequence[Picture]) -> Values:
        """Each image's mean distance to the others of its prompt."""
        maps = [image for batch in batches(pictures, self.batch_size) for image in self._maps(batch)]
        table = np.zeros((len(maps), len(maps)))
        for one in range(len(maps)):
            for other in range(one):
                table[one, other] = table[other, one] = float(distance(maps[one], maps[other], self._network[1]))
        return table.sum(1) / (len(maps) - 1)

    def _maps(self, pictures: Sequence[Picture]) -> list[list[Tensor]]:
        """Every image's five maps."""
        pixels = to_tensor([picture.image for picture in pictures], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).to(self.device)
        return [list(maps) for maps in zip(*self._network[0](pixels), strict=True)]


def _check(pictures: Sequence[Picture]) -> None:
    """Raises UserError for images of a prompt that cannot be compared with each other."""
    caption = pictures[0].caption
    if len(pictures) < 2:
        raise UserError(f"metric 'lpips' compares the images of one prompt, and '{caption}' has only one; ask for --images-per-prompt 2 or more")
    shapes = {picture.image.shape for picture in pictures}
    if len(shapes) > 1:
        raise UserError(f"metric 'lpips' compares images of one size, and those of '{caption}' have {len(shapes)} sizes: {sorted(shapes)}")


def make(resources: Resources) -> Diversity:
    """LPIPS diversity with its two weights: the classifier, then the linear weights. Raises UserError if they are missing."""
    trunk, linear = find("lpips", [TRUNK, LINEAR], resources.weights)
    return Diversity(trunk, linear, resources.batch_size, torch.device(resources.device))
