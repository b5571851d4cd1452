"""Inception v3 features of the FID, and the Inception score.

The network is InceptionV3 as TensorFlow published it on 2015-12-05. It differs from later versions in three
ways: average pooling does not count the padding, the last block pools by maximum, and it has 1008 classes.
Parameter names and shapes are those of the ported weights, pt_inception-2015-12-05-6726825d.pth.
Source: Szegedy et al., arXiv:1512.00567.

inception_score: does each image show one thing clearly, and do the images show many things? It needs no real
images. IS = exp E KL(p(y|x) ‖ p(y)). Source: Salimans et al., arXiv:1606.03498. Deviation: computed over all
images at once; the paper averages over ten parts (that value depends on their order, and is a little lower).
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afa.metrics.base import Features, Indices, SetMetric, Values, batches, copies
from afa.metrics.registry import Resources
from afa.metrics.weights import FoundPart, Part, find, network_loader, read_tensors

SIDE, FEATURES, CLASSES = 299, 2048, 1008

Kernel = int | tuple[int, int]


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, before: int, after: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.bn(self.conv(hidden)).relu()


def _same(before: int, after: int, kernel: Kernel) -> Unit:
    """Make a unit that keeps the size of the map."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Unit(before, after, kernel, padding=(height // 2, width // 2))


class Branches(nn.Module):
    """Parallel branches, concatenated on the channels: chains of units by name, then the pooled input."""

    def __init__(self, pool: nn.Module, chains: tuple[tuple[str, ...], ...], units: dict[str, Unit]) -> None:
        super().__init__()
        self.pool, self.chains = pool, chains
        for name, unit in units.items():
            self.add_module(name, unit)

    def forward(self, hidden: Tensor) -> Tensor:
        outputs = [self._chain(hidden, chain) for chain in self.chains]
        pooled = self.pool(hidden)
        return torch.cat([*outputs, self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled], 1)

    def _chain(self, hidden: Tensor, chain: tuple[str, ...]) -> Tensor:
        for name in chain:
            sides = [name] if hasattr(self, name) else [f"{name}a", f"{name}b"]  # a fork: both see the same
            hidden = torch.cat([getattr(self, side)(hidden) for side in sides], 1)
        return hidden


def _average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def _mixed_5(before: int, pooled: int) -> Branches:
    """35×35: 1×1, 5×5, two 3×3."""
    units = {
        "branch1x1": Unit(before, 64, 1),
        "branch5x5_1": Unit(before, 48, 1),
        "branch5x5_2": _same(48, 64, 5),
        "branch3x3dbl_1": Unit(before, 64, 1),
        "branch3x3dbl_2": _same(64, 96, 3),
        "branch3x3dbl_3": _same(96, 96, 3),
        "branch_pool": Unit(before, pooled, 1),
    }
    chains = (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    )
    return Branches(_average(), chains, units)


def _mixed_6a(before: int) -> Branches:
    """35×35 -> 17×17."""
    units = {
        "branch3x3": Unit(before, 384, 3, 2),
        "branch3x3dbl_1": Unit(before, 64, 1),
        "branch3x3dbl_2": _same(64, 96, 3),
        "branch3x3dbl_3": Unit(96, 96, 3, 2),
    }
    return Branches(
        nn.MaxPool2d(3, 2), (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")), units
    )


def _mixed_6(before: int, narrow: int) -> Branches:
    """17×17: 1×1, one 7×7 and two 7×7, taken apart into 1×7 and 7×1."""
    row, column = (1, 7), (7, 1)
    single, double = (
        [f"branch7x7{kind}_{k}" for k in range(1, count + 1)] for kind, count in (("", 3), ("dbl", 5))
    )
    units = {"branch1x1": Unit(before, 192, 1), single[0]: Unit(before, narrow, 1)}
    units |= {
        single[1]: _same(narrow, narrow, row),
        single[2]: _same(narrow, 192, column),
        double[0]: Unit(before, narrow, 1),
    }
    units |= {
        name: _same(narrow, narrow, kernel)
        for name, kernel in zip(double[1:4], (column, row, column), strict=True)
    }
    units |= {double[4]: _same(narrow, 192, row), "branch_pool": Unit(before, 192, 1)}
    return Branches(_average(), (("branch1x1",), tuple(single), tuple(double)), units)


def _mixed_7a(before: int) -> Branches:
    """17×17 -> 8×8."""
    units = {
        "branch3x3_1": Unit(before, 192, 1),
        "branch3x3_2": Unit(192, 320, 3, 2),
        "branch7x7x3_1": Unit(before, 192, 1),
        "branch7x7x3_2": _same(192, 192, (1, 7)),
        "branch7x7x3_3": _same(192, 192, (7, 1)),
        "branch7x7x3_4": Unit(192, 192, 3, 2),
    }
    chains = (("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{k}" for k in range(1, 5)))
    return Branches(nn.MaxPool2d(3, 2), chains, units)


def _mixed_7(before: int, pool: nn.Module) -> Branches:
    """8×8: 1×1, one 3×3 and two 3×3, the last of each a 1×3 beside a 3×1."""
    row, column = (1, 3), (3, 1)
    units = {
        "branch1x1": Unit(before, 320, 1),
        "branch3x3_1": Unit(before, 384, 1),
        "branch3x3_2a": _same(384, 384, row),
        "branch3x3_2b": _same(384, 384, column),
        "branch3x3dbl_1": Unit(before, 448, 1),
        "branch3x3dbl_2": _same(448, 384, 3),
        "branch3x3dbl_3a": _same(384, 384, row),
        "branch3x3dbl_3b": _same(384, 384, column),
        "branch_pool": Unit(before, 192, 1),
    }
    chains = (
        ("branch1x1",),
        ("branch3x3_1", "branch3x3_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    )
    return Branches(pool, chains, units)


class Inception(nn.Module):
    """Inception v3: pixels (B, 3, H, W) in 0 … 255 to the features before the classifier (B, 2048)."""

    num_features = FEATURES  # as torchmetrics asks for it

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _same(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = _mixed_6a(288)
        self.Mixed_6b, self.Mixed_6c = _mixed_6(768, 128), _mixed_6(768, 160)
        self.Mixed_6d, self.Mixed_6e = _mixed_6(768, 160), _mixed_6(768, 192)
        self.Mixed_7a = _mixed_7a(768)
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, _average()), _mixed_7(2048, nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = (resize(pixels.float(), SIDE) - 128) / 128
        for stage in self.stages():
            hidden = stage(hidden)
        return hidden.mean((2, 3))

    def stages(self) -> list[nn.Module]:
        """Return the layers in order; max pooling follows the third and the fifth convolution."""
        stem = [self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, nn.MaxPool2d(3, 2)]
        stem += [self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, nn.MaxPool2d(3, 2)]
        mixed = [module for name, module in self.named_children() if name.startswith("Mixed")]
        return [*stem, *mixed]


def resize(pixels: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, side, side) bilinearly as TensorFlow 1 did.

    Point i is taken at i · old / new, without half-pixel centres and without antialiasing.
    """
    for axis in (2, 3):
        old = pixels.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=pixels.device) * torch.tensor(
            old / side, dtype=torch.float32
        )
        low = place.long().clamp(max=old - 1)
        between = (place - low).reshape(-1, *[1] * (3 - axis))
        first, second = (
            pixels.index_select(axis, low),
            pixels.index_select(axis, (low + 1).clamp(max=old - 1)),
        )
        pixels = first + (second - first) * between
    return pixels


RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS = Part(
    "the FID Inception network",
    "pt_inception-2015-12-05-6726825d.pth",
    url=f"{RELEASE}pt_inception-2015-12-05-6726825d.pth",
    sha256=("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",),
    also=("weights-inception-2015-12-05-6726825d.pth",),  # the same file by torch-fidelity's name
)
PREPROCESSING = "resized to 299 px as TensorFlow 1 did (bilinear, no antialiasing), (x - 128) / 128"


class InceptionFeatures:
    """The 2048 features before the classifier, and the classifier; loaded when first used."""

    def __init__(self, found: FoundPart, device: torch.device) -> None:
        self.found, self.device = found, device
        self._load = network_loader(Inception, read_tensors(found.path), found.path)

    @property
    def identity(self) -> dict[str, Any]:
        return {"features": "inception-2048", "preprocessing": "tf1-299", "weights": self.found.identity}

    @property
    def source(self) -> str:
        return f"2048 features of {self.found}, {PREPROCESSING}"

    @cached_property
    def _network(self) -> Inception:
        return self._load(self.device)

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]], batch_size: int) -> NDArray[np.float32]:
        """Return features (n, 2048) of n images of any sizes."""
        parts = [self._network(_pixels(batch).to(self.device)) for batch in batches(images, batch_size)]
        return torch.cat(parts).cpu().numpy()

    def logits(self, features: Features) -> NDArray[np.float64]:
        """Return logits (n, 1008) of features (n, 2048).

        The classifier's bias is left out, as in all implementations of the Inception score.
        """
        weight = self._network.fc.weight.cpu().double().numpy()
        return np.asarray(features, np.float64) @ weight.T


def _pixels(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Return pixels (n, 3, 299, 299) in 0 … 255. Images may have different sizes."""
    return torch.cat([resize(torch.tensor(image).permute(2, 0, 1)[None].float(), SIDE) for image in images])


def inception_features(metric: str, resources: Resources) -> InceptionFeatures:
    """Return the network; metrics with equal weights share it.

    Raises UserError if the weights are missing.
    """
    (found,) = find(metric, [WEIGHTS], resources.weights)
    return _shared(found.path.resolve(), tuple(found.hashes.items()), str(resources.device))


@lru_cache(maxsize=2)
def _shared(path: Path, hashes: tuple[tuple[str, str], ...], device: str) -> InceptionFeatures:
    return InceptionFeatures(FoundPart(WEIGHTS, path, dict(hashes)), torch.device(device))


Array = NDArray[np.float64]


class InceptionMetric(SetMetric):
    """A set metric on Inception features.

    what: one sentence, with {} for the source of the features
    """

    what: ClassVar[str]

    def __init__(self, extract: InceptionFeatures, batch_size: int) -> None:
        self.extract, self.batch_size = extract, batch_size
        self.source = self.what.format(extract.source)

    @property
    def identity(self) -> dict[str, Any]:
        return self.extract.identity

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return self.extract(images, self.batch_size)


class InceptionScore(InceptionMetric):
    """The Inception score: 1 (all images alike, or uncertain) to the number of classes; higher is better."""

    name = "inception_score"
    needs_reference: ClassVar[bool] = False
    what = "exp E KL over all images, 1008 classes (without bias) from {}; arXiv:1606.03498"

    def value(self, features: Features, reference: None) -> float:
        logs = log_softmax(self.extract.logits(features))
        return float(score(logs, np.ones((1, len(logs))))[0])

    def replicates(self, features: Features, groups: Indices, reference: None, draws: Indices) -> Values:
        logs = log_softmax(self.extract.logits(features))
        return np.concatenate(
            [score(logs, times[None].astype(np.float64)) for times in copies(groups, draws)]
        )


def log_softmax(logits: Array) -> Array:
    """Return log probabilities (n, classes)."""
    shifted = logits - logits.max(1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def score(logs: Array, times: Array) -> Values:
    """Return the score of each draw, (R,).

    logs:  (n, classes) log p(y|x)
    times: (R, n) how often each image counts
    E KL(p(y|x) ‖ p(y)) is the entropy of the mean minus the mean entropy.
    """
    each = np.exp(logs)
    share = times / times.sum(1, keepdims=True)
    mean = share @ each
    entropy = -np.sum(mean * np.log(np.where(mean > 0, mean, 1)), axis=1)
    found: Values = np.exp(entropy + share @ np.sum(np.where(each > 0, each * logs, 0), axis=1))
    return found


def make_inception_score(resources: Resources) -> InceptionScore:
    """Make the Inception score. Raises UserError if its weights are missing."""
    return InceptionScore(inception_features("inception_score", resources), resources.batch_size)
