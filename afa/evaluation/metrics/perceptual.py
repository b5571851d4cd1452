"""LPIPS: how different two images look, by the features of a classifier.

Source: Zhang et al., arXiv:1801.03924, version 0.1 with its linear weights. The classifier's weights are those torchvision
publishes, AlexNet (the default) or VGG16; which, is read from the tensors. Deviation: none.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from afa.evaluation.metrics.loading import check_network, load_network, read_tensors

# Layers of torchvision's `features`: (channels, kernel, stride, padding) of a convolution with its ReLU, or max pooling.
POOL, POOL_VGG = ("pool", 3, 2), ("pool", 2, 2)
Layer = tuple[int, int, int, int] | tuple[str, int, int]
ALEXNET: tuple[Layer, ...] = ((64, 11, 4, 2), POOL, (192, 5, 1, 2), POOL, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
VGG16: tuple[Layer, ...] = tuple(
    layer
    for times, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
    for layer in (*[(channels, 3, 1, 1)] * times, POOL_VGG)
)[:-1]
TAPS = {ALEXNET: (0, 2, 4, 5, 6), VGG16: (1, 4, 8, 12, 16)}  # layers that are looked at
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]


class Trunk(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] -> five maps (B, C, h, w), each pixel's features of unit length."""

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
    """What each channel counts at the five places, under the published names (lin0.model.1 …; model.0 was dropout)."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        for index, tap in enumerate(TAPS[layers]):
            layer = nn.Sequential(nn.Identity(), nn.Conv2d(int(layers[tap][0]), 1, 1, bias=False))
            self.add_module(f"lin{index}", nn.ModuleDict({"model": layer}))

    def weights(self) -> list[Tensor]:
        """Five of (C,)."""
        return [parameter.flatten() for parameter in self.parameters()]


class Perceptual:
    """The two networks in two files. Raises UserError if they are no such weights, or not of one classifier."""

    def __init__(self, trunk: Path, linear: Path) -> None:
        self._trunk, self._linear = read_tensors(trunk), read_tensors(linear)
        self._layers = VGG16 if "features.28.weight" in self._trunk else ALEXNET
        check_network(self._build_trunk, self._trunk, trunk)
        check_network(self._build_linear, self._linear, linear)

    def _build_trunk(self) -> Trunk:
        return Trunk(self._layers)

    def _build_linear(self) -> Linear:
        return Linear(self._layers)

    def load(self, device: torch.device) -> tuple[Trunk, list[Tensor]]:
        """The trunk, and what its channels count."""
        linear = load_network(self._build_linear, self._linear, device)
        return load_network(self._build_trunk, self._trunk, device), linear.weights()


def distance(one: list[Tensor], other: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Two images' maps, five of (C, h, w) each -> a number: squared differences, weighted by channel, averaged over the map."""
    squares = [(a - b).square() for a, b in zip(one, other, strict=True)]
    return torch.stack([torch.einsum("c,chw->hw", *each).mean() for each in zip(weights, squares, strict=True)]).sum()
