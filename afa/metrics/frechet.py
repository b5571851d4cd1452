"""Fréchet distances between two sets of features, each described by a Gaussian: FID and FD-DINOv2.

d² = |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½). Covariances divide by n - 1, and all arithmetic is float64, as in
the published implementations. It grows when there are fewer images, equally for all methods.

fid: on Inception features. Source: Heusel et al., arXiv:1706.08500. Deviation: none.

fd_dinov2: on DINOv2 features, which agree better with human judgement than Inception's.
Source: Stein et al., arXiv:2306.04675; the class token of DINOv2 ViT-L/14 at 224 px. Deviation: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from afa.metrics.base import Features, Indices, SetMetric, Values, batches, copies
from afa.metrics.inception import InceptionMetric, inception_features
from afa.metrics.pixels import IMAGENET_MEAN, IMAGENET_STD, stretch, to_tensor
from afa.metrics.registry import Resources
from afa.metrics.weights import FoundPart, Part, find, folder_loader

Array = NDArray[np.float64]
BLOCK = 4096  # rows in float64 at once
# rows of the matrix whose eigenvalues a replicate needs; a thousand of larger ones would take hours
EXACT_UP_TO = 1_000


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs of the reference features.

    mean:  (D,)
    trace: of the covariance
    root:  (r, D); root.T @ root is the covariance
    """

    mean: Array
    trace: float
    root: Array


def moments(features: Features) -> Moments:
    """Return the moments of features (n, D); the root has min(n, D) rows. Raises ValueError for n < 2."""
    n, width = features.shape
    if n < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images, got {n}")
    mean = np.mean(features, axis=0, dtype=np.float64)
    if n <= width:
        root = (features - mean) / np.sqrt(n - 1)
    else:  # a root of D rows is smaller than the centred features
        values, vectors = np.linalg.eigh(_covariance(features, mean))
        root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    return Moments(mean, float(np.sum(root**2)), root)


def _covariance(features: Features, mean: Array) -> Array:
    """Return the covariance (D, D), summed block by block to save memory."""
    total = np.zeros((features.shape[1], features.shape[1]))
    for block in batches(features, BLOCK):
        centred = np.asarray(block, np.float64) - mean
        total += centred.T @ centred
    return total / (len(features) - 1)


def frechet_distance(features: Features, reference: Moments) -> float:
    """Return the squared distance of features (n, D) to a reference.

    tr (Σ₁ Σ₂)^½ is the sum of the singular values of A B', where A'A = Σ₁ and B'B = Σ₂. This is exact, avoids
    the square root of an ill-conditioned product, and is small if there are fewer images than features.
    """
    own = moments(features)
    cross = np.linalg.svd(own.root @ reference.root.T, compute_uv=False).sum()
    distance = np.sum((own.mean - reference.mean) ** 2) + own.trace + reference.trace - 2 * cross
    return float(max(distance, 0.0))


def exact_replicates(features: Features, groups: Indices, reference: Moments, draws: Indices) -> Values:
    """Return the exact distance of each draw (see SetMetric.replicates).

    All draws share one product of the features with the reference's root. Each draw needs only the
    eigenvalues of a matrix of min(images drawn, r) rows.
    """
    mean = np.mean(features, axis=0, dtype=np.float64)
    centred = np.asarray(features, np.float64) - mean
    drawn = _Draws(centred, np.sum(centred**2, axis=1), centred @ reference.root.T)
    return np.asarray([drawn.distance(times, mean, reference) for times in copies(groups, draws)])


@dataclass(frozen=True)
class _Draws:
    """What all draws share: centred features (n, D), squared lengths (n,), products with the root (n, r)."""

    centred: Array
    lengths: Array
    products: Array

    def distance(self, times: Indices, mean: Array, reference: Moments) -> float:
        """Return the distance of one draw.

        times: (n,) how often each image was drawn
        mean:  (D,) of all features
        """
        total = int(times.sum())
        if total < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 images, got {total}")
        shift = times @ self.centred / total
        trace = (times @ self.lengths - total * shift @ shift) / (total - 1)
        there = np.flatnonzero(times)
        rows = self.products[there] - times @ self.products / total  # A B' of the draw, but for the weights
        rows *= np.sqrt(times[there] / (total - 1))[:, None]
        product = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(product), 0, None)).sum()
        return max(
            float(np.sum((mean + shift - reference.mean) ** 2) + trace + reference.trace - 2 * cross), 0.0
        )


def linear_replicates(features: Features, groups: Indices, reference: Moments, draws: Indices) -> Values:
    """Return the distance of each draw to first order, from one decomposition.

    The influence of an image on the distance is 2 (μ₁ - μ₂)'z + |z|² - |(B Σ₁ B')^-¼ B z|² with z = x - μ₁. A
    replicate is the distance plus the mean influence of the drawn images, minus that of all images. The
    second-order term, which images drawn twice add to every distance, is missing: with few images the spread
    is narrower than that of exact_replicates, and closer to that of new images.
    Source: the infinitesimal jackknife, Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    chapter 21; the derivative of tr (Σ₁ Σ₂)^½ is ours.
    """
    own = moments(features)
    values, vectors = np.linalg.eigh((reference.root @ own.root.T) @ (own.root @ reference.root.T))
    kept = values > values.max() * 1e-12  # directions in which nothing varies have no influence
    quarter = (vectors[:, kept] * values[kept] ** -0.25).T @ reference.root
    influence = np.concatenate(
        [_influence(block, own, reference, quarter) for block in batches(features, BLOCK)]
    )
    influence -= influence.mean()
    distance = frechet_distance(features, reference)
    return np.asarray([distance + times @ influence / times.sum() for times in copies(groups, draws)])


def _influence(block: Features, own: Moments, reference: Moments, quarter: Array) -> Array:
    """Return the influence of some images on the distance, up to a constant: (n,)."""
    z = np.asarray(block, np.float64) - own.mean
    return 2 * z @ (own.mean - reference.mean) + np.sum(z**2, axis=1) - np.sum((z @ quarter.T) ** 2, axis=1)


class FrechetDistance(SetMetric):
    """A Fréchet distance between the features of images and of real images."""

    higher_is_better: ClassVar[bool] = False

    def prepare(self, reference: Features) -> Moments:
        return moments(reference)

    def value(self, features: Features, reference: Moments) -> float:
        return frechet_distance(features, reference)

    def replicates(self, features: Features, groups: Indices, reference: Moments, draws: Indices) -> Values:
        exact = min(len(features), len(reference.root)) <= EXACT_UP_TO
        return (exact_replicates if exact else linear_replicates)(features, groups, reference, draws)


class FrechetInceptionDistance(InceptionMetric, FrechetDistance):
    """The Fréchet distance on Inception features. 0 and above, lower is better."""

    name = "fid"
    what = "Fréchet distance on {}; arXiv:1706.08500"


def make_fid(resources: Resources) -> FrechetInceptionDistance:
    """Make FID. Raises UserError if its weights are missing."""
    return FrechetInceptionDistance(inception_features("fid", resources), resources.batch_size)


WEIGHTS = Part("DINOv2 ViT-L/14", "dinov2-large", hub="facebook/dinov2-large", folder=True)
SIDE = 224


class DinoDistance(FrechetDistance):
    """The Fréchet distance on DINOv2's class tokens. 0 and above, lower is better."""

    name = "fd_dinov2"

    def __init__(self, found: FoundPart, batch_size: int, device: torch.device) -> None:
        from transformers import Dinov2Model

        self.found, self.batch_size, self.device = found, batch_size, device
        self.source = (
            f"Fréchet distance on class tokens of {found}, images stretched to {SIDE} px (bicubic); "
            "arXiv:2306.04675"
        )
        self._load = folder_loader(Dinov2Model, found.path)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "features": "dinov2-class-token",
            "preprocessing": f"stretch-{SIDE}",
            "weights": self.found.identity,
        }

    @cached_property
    def _network(self) -> Any:
        return self._load(self.device)

    @torch.no_grad()
    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return np.concatenate([self._tokens(batch) for batch in batches(images, self.batch_size)])

    def _tokens(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        pixels = to_tensor([stretch(image, SIDE) for image in images], IMAGENET_MEAN, IMAGENET_STD)
        return self._network(pixel_values=pixels.to(self.device)).pooler_output.cpu().numpy()


def make_fd_dinov2(resources: Resources) -> DinoDistance:
    """Make FD-DINOv2. Raises UserError if its weights are missing."""
    (found,) = find("fd_dinov2", [WEIGHTS], resources.weights)
    return DinoDistance(found, resources.batch_size, torch.device(resources.device))
