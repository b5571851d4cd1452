"""LPIPS diversity: how different the images of one prompt look.

An image's score is its mean LPIPS distance to the other images of its prompt. LPIPS compares the features of
an image classifier, AlexNet (the default) or VGG16, with the weights that torchvision publishes; which of the
two is read from the tensors.
Source of LPIPS: Zhang et al., arXiv:1801.03924, version 0.1 with its linear weights. Deviation: none.
Source of the diversity: Zhu et al., arXiv:1711.11586.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.metrics.base import ImageMetric, Picture, Values, batches
from afa.metrics.pixels import to_tensor
from afa.metrics.registry import Resources
from afa.metrics.weights import FoundPart, Part, find, network_loader, read_tensors

# Layers of torchvision's `features`: (channels, kernel, stride, padding) of a convolution with its ReLU, or
# max pooling.
POOL, POOL_VGG = ("pool", 3, 2), ("pool", 2, 2)
Layer = tuple[int, int, int, int] | tuple[str, int, int]
ALEXNET: tuple[Layer, ...] = (
    (64, 11, 4, 2),
    POOL,
    (192, 5, 1, 2),
    POOL,
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    (256, 3, 1, 1),
)
VGG16: tuple[Layer, ...] = tuple(
    layer
    for times, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
    for layer in (*[(channels, 3, 1, 1)] * times, POOL_VGG)
)[:-1]
TAPS = {ALEXNET: (0, 2, 4, 5, 6), VGG16: (1, 4, 8, 12, 16)}  # layers that are looked at
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]


class Trunk(nn.Module):
    """The classifier's trunk: pixels (B, 3, H, W) in [-1, 1] to five maps (B, C, h, w).

    The features of each pixel of a map have unit length.
    """

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        taps, before = [], 3
        for index, layer in enumerate(layers):
            if isinstance(layer[0], str):
                modules.append(nn.MaxPool2d(layer[1], layer[2]))
            else:
                modules += [nn.Conv2d(before, layer[0], *layer[1:]), nn.ReLU()]
                before = layer[0]
            if index in TAPS[layers]:
                taps.append(len(modules) - 1)
        self.features, self.taps = nn.Sequential(*modules), taps

    def forward(self, pixels: Tensor) -> list[Tensor]:
        hidden = (pixels - pixels.new_tensor(SHIFT)[:, None, None]) / pixels.new_tensor(SCALE)[:, None, None]
        maps = []
        for index, module in enumerate(self.features):
            hidden = module(hidden)
            if index in self.taps:
                maps.append(hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps


class Linear(nn.Module):
    """The weight of each channel of the five maps, with the published names (lin0.model.1 …)."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        for index, tap in enumerate(TAPS[layers]):
            layer = nn.Sequential(nn.Identity(), nn.Conv2d(int(layers[tap][0]), 1, 1, bias=False))
            self.add_module(f"lin{index}", nn.ModuleDict({"model": layer}))

    def weights(self) -> list[Tensor]:
        """Return five weights (C,)."""
        return [parameter.flatten() for parameter in self.parameters()]


def distance(one: list[Tensor], other: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return the LPIPS distance of two images.

    one, other: five maps (C, h, w) each
    weights:    five (C,)
    Squared differences, weighted by channel, are averaged over each map and added up.
    """
    squares = [(a - b).square() for a, b in zip(one, other, strict=True)]
    return torch.stack(
        [torch.einsum("c,chw->hw", *each).mean() for each in zip(weights, squares, strict=True)]
    ).sum()


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
    """LPIPS diversity: 0 for equal images, higher is more diverse. It does not judge quality.

    A prompt needs at least two images.
    """

    names = ("lpips",)

    def __init__(self, trunk: FoundPart, linear: FoundPart, batch_size: int, device: torch.device) -> None:
        self.trunk, self.linear, self.batch_size, self.device = trunk, linear, batch_size, device
        self.source = (
            f"mean LPIPS to the other images of the prompt, by {trunk} and {linear}, images as they are; "
            "arXiv:1801.03924"
        )
        features = read_tensors(trunk.path)
        layers = VGG16 if "features.28.weight" in features else ALEXNET
        self._load_trunk = network_loader(lambda: Trunk(layers), features, trunk.path)
        self._load_linear = network_loader(lambda: Linear(layers), read_tensors(linear.path), linear.path)

    @property
    def identity(self) -> dict[str, Any]:
        return {"trunk": self.trunk.identity, "linear": self.linear.identity}

    @cached_property
    def _network(self) -> Any:
        return self._load_trunk(self.device), self._load_linear(self.device).weights()

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
        """Return each image's mean distance to the other images of its prompt."""
        maps = [image for batch in batches(pictures, self.batch_size) for image in self._maps(batch)]
        table = np.zeros((len(maps), len(maps)))
        for one in range(len(maps)):
            for other in range(one):
                table[one, other] = table[other, one] = float(
                    distance(maps[one], maps[other], self._network[1])
                )
        return table.sum(1) / (len(maps) - 1)

    def _maps(self, pictures: Sequence[Picture]) -> list[list[Tensor]]:
        """Return each image's five maps."""
        pixels = to_tensor([picture.image for picture in pictures], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).to(
            self.device
        )
        return [list(maps) for maps in zip(*self._network[0](pixels), strict=True)]


def _check(pictures: Sequence[Picture]) -> None:
    """Raise UserError if a prompt has one image only, or images of different sizes."""
    caption = pictures[0].caption
    if len(pictures) < 2:
        raise UserError(
            f"metric 'lpips' compares the images of one prompt, and '{caption}' has only one; "
            "ask for --images-per-prompt 2 or more"
        )
    shapes = {picture.image.shape for picture in pictures}
    if len(shapes) > 1:
        raise UserError(
            f"metric 'lpips' compares images of one size, and those of '{caption}' have {len(shapes)} sizes: "
            f"{sorted(shapes)}"
        )


def make_lpips(resources: Resources) -> Diversity:
    """Make LPIPS diversity from two parts: the classifier, then the linear weights.

    Raises UserError if one is missing.
    """
    trunk, linear = find("lpips", [TRUNK, LINEAR], resources.weights)
    return Diversity(trunk, linear, resources.batch_size, torch.device(resources.device))
