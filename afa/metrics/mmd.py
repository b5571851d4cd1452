"""Squared maximum mean discrepancies (MMD²) of two sets of features: KID and CMMD.

MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y), over all pairs, in float64.
Source: Gretton et al., A kernel two-sample test, JMLR 13 (2012).

cmmd: on CLIP embeddings, without a Gaussian assumption; stable with a few thousand images.
k(x, y) = exp(-|x - y|² / 2·10²) on unit vectors; pairs of an image with itself count; times 1000.
Source: Jayasumana et al., arXiv:2401.09603. Deviation: images are resized by Pillow (bicubic, antialiased),
which rounds to whole pixel values.

kid: on Inception features; unbiased, so sets of different sizes can be compared. k(x, y) = (x·y / D + 1)³.
Source: Bińkowski et al., arXiv:1801.01401. Deviation: over all pairs; the paper averages over random subsets
of 1,000 (the same expectation; ours has less noise and uses no random numbers).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.metrics.base import Features, Indices, SetMetric, Values, copies
from afa.metrics.clip import Clip, shared_clip
from afa.metrics.inception import InceptionFeatures, InceptionMetric, inception_features
from afa.metrics.registry import Resources
from afa.metrics.weights import FoundPart, Part, find

Array = NDArray[np.float64]
BLOCK = 1 << 24  # entries of a kernel matrix in memory at once
EXACT_UP_TO = 5_000  # images; of more, replicates are linear


@dataclass(frozen=True)
class Reference:
    """The real images: features (m, D), and the mean kernel between them."""

    features: Features
    within: float


def double_device(device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


class Discrepancy(SetMetric):
    """The MMD² between the features of images and of real images, times `scale`.

    unbiased: pairs of an image with itself do not count (the value can be negative); else they count
    device:   computes the kernels; see double_device
    """

    higher_is_better: ClassVar[bool] = False
    unbiased: ClassVar[bool]
    scale: ClassVar[float] = 1.0
    device: torch.device

    @abstractmethod
    def kernel(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the kernel (a, b) of features (a, D) and (b, D)."""

    def prepare(self, reference: Features) -> Reference:
        return Reference(reference, self._within(reference))

    def value(self, features: Features, reference: Reference) -> float:
        across = np.concatenate(
            [block.mean(1) for block in self._blocks(features, reference.features)]
        ).mean()
        return float(self.scale * (self._within(features) + reference.within - 2 * across))

    def replicates(self, features: Features, groups: Indices, reference: Reference, draws: Indices) -> Values:
        exact = len(features) <= EXACT_UP_TO
        return (self._exact if exact else self._linear)(features, groups, reference, draws)

    def _exact(self, features: Features, groups: Indices, reference: Reference, draws: Indices) -> Values:
        """Compute from kernels that are summed over the images of each pair of prompts."""
        order = np.argsort(groups, kind="stable")
        present, starts = np.unique(groups[order], return_index=True)
        own = features[order]
        rows = np.concatenate([np.add.reduceat(block, starts, axis=1) for block in self._blocks(own, own)])
        means = np.concatenate([block.mean(1) for block in self._blocks(own, reference.features)])
        counts = np.stack([np.bincount(draw, minlength=draws.shape[1])[present] for draw in draws]).astype(
            np.float64
        )
        pairs = np.einsum("rg,rg->r", counts @ np.add.reduceat(rows, starts, axis=0), counts)
        of_images = (self._selves(own), means, np.ones(len(own)))
        selves, across, sizes = (counts @ np.add.reduceat(each, starts) for each in of_images)
        found: Values = self.scale * (
            self._mean(pairs, selves, sizes) + reference.within - 2 * across / sizes
        )
        return found

    def _linear(self, features: Features, groups: Indices, reference: Reference, draws: Indices) -> Values:
        """Add the mean influence of the drawn images, minus that of all; see frechet.linear_replicates.

        Influences are computed against at most EXACT_UP_TO images of each set, evenly spread.
        """
        marks, real = (each[:: -(-len(each) // EXACT_UP_TO)] for each in (features, reference.features))
        near, far = (
            np.concatenate([block.mean(1) for block in self._blocks(features, others)])
            for others in (marks, real)
        )
        influence = 2 * self.scale * (near - far)
        influence -= influence.mean()
        value = self.value(features, reference)
        return np.asarray([value + times @ influence / times.sum() for times in copies(groups, draws)])

    def _within(self, features: Features) -> float:
        """Return the mean kernel within a set. Raises ValueError if there are no pairs."""
        if len(features) < 2:
            raise ValueError(f"a discrepancy needs at least 2 images, got {len(features)}")
        total = sum(block.sum() for block in self._blocks(features, features))
        return float(self._mean(total, self._selves(features).sum(), len(features)))

    def _mean(self, pairs: Array | float, selves: Array | float, n: Array | int) -> Array | float:
        """Return the mean, given the sums over all n² pairs and over the n pairs of an image with itself."""
        return (pairs - selves) / (n * (n - 1)) if self.unbiased else pairs / n**2

    def _selves(self, features: Features) -> Array:
        """Return each image's kernel with itself: (n,)."""
        rows = torch.from_numpy(np.asarray(features, np.float64, order="C"))
        return np.asarray([self.kernel(row[None], row[None])[0, 0] for row in rows])

    def _blocks(self, one: Features, other: Features) -> Iterator[Array]:
        """Yield the kernel matrix, some rows at a time."""
        rows, columns = (torch.from_numpy(np.asarray(each, np.float64, order="C")) for each in (one, other))
        columns = columns.to(self.device)
        for part in rows.split(max(1, BLOCK // len(columns))):
            yield self.kernel(part.to(self.device), columns).cpu().numpy()


WEIGHTS = Part(
    "CLIP ViT-L/14 at 336 px",
    "clip-vit-large-patch14-336",
    hub="openai/clip-vit-large-patch14-336",
    folder=True,
)
SIGMA = 10


class ClipDiscrepancy(Discrepancy):
    """The MMD² of CLIP embeddings with a Gaussian kernel, times 1000. 0 and above, lower is better."""

    name = "cmmd"
    unbiased = False
    scale = 1000.0

    def __init__(self, clip: Clip, found: FoundPart, batch_size: int, device: torch.device) -> None:
        self.clip, self.found, self.batch_size, self.device = clip, found, batch_size, double_device(device)
        self.source = (
            f"1000 · MMD², Gaussian kernel of width 10, on embeddings of {found}, "
            "images stretched to its side; arXiv:2401.09603"
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {"features": "clip-unit", "preprocessing": "stretch", "weights": self.found.identity}

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return self.clip.images(images, self.batch_size, fit="stretch")

    def kernel(self, one: Tensor, other: Tensor) -> Tensor:
        return gaussian(one, other)


def gaussian(one: Tensor, other: Tensor) -> Tensor:
    """(a, D), (b, D) -> (a, b): exp(-|x - y|² / 2·10²)."""
    squares = one.square().sum(1)[:, None] + other.square().sum(1) - 2 * one @ other.T
    return torch.exp(-squares / (2 * SIGMA**2))


def make_cmmd(resources: Resources) -> ClipDiscrepancy:
    """Make CMMD. Raises UserError if its weights are missing."""
    (found,) = find("cmmd", [WEIGHTS], resources.weights)
    device = torch.device(resources.device)
    return ClipDiscrepancy(shared_clip(found, device), found, resources.batch_size, device)


class KernelInceptionDistance(InceptionMetric, Discrepancy):
    """The unbiased MMD² on Inception features. 0 for images from the real distribution, lower is better."""

    name = "kid"
    unbiased = True
    what = "unbiased MMD² with a cubic kernel over all pairs on {}; arXiv:1801.01401"

    def __init__(self, extract: InceptionFeatures, batch_size: int, device: torch.device) -> None:
        super().__init__(extract, batch_size)
        self.device = double_device(device)

    def kernel(self, one: Tensor, other: Tensor) -> Tensor:
        return cubic(one, other)


def cubic(one: Tensor, other: Tensor) -> Tensor:
    """(a, D), (b, D) -> (a, b): (x·y / D + 1)³."""
    return (one @ other.T / one.shape[1] + 1) ** 3


def make_kid(resources: Resources) -> KernelInceptionDistance:
    """Make KID. Raises UserError if its weights are missing."""
    return KernelInceptionDistance(
        inception_features("kid", resources), resources.batch_size, torch.device(resources.device)
    )
