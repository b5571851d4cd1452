"""KID: the kernel inception distance; unbiased, so it can be compared between sets of different sizes.

Source: Bińkowski et al., arXiv:1801.01401: k(x, y) = (x·y / D + 1)³. Deviation: over all pairs, where the paper averages
over random subsets of 1,000 (the same expectation, less noise, no random numbers).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.evaluation.metrics.base import Features
from afa.evaluation.metrics.inception_features import InceptionFeatures, inception_features
from afa.evaluation.metrics.mmd import Discrepancy, double_device
from afa.evaluation.metrics.table import Resources


class KernelInceptionDistance(Discrepancy):
    """The unbiased MMD² on Inception features. 0 for images from the real distribution, lower is better."""

    name = "kid"
    unbiased = True

    def __init__(self, extract: InceptionFeatures, batch_size: int, device: torch.device) -> None:
        self.extract, self.batch_size, self.device = extract, batch_size, double_device(device)
        self.source = f"unbiased MMD² with a cubic kernel over all pairs on {extract.source}; arXiv:1801.01401"

    @property
    def identity(self) -> dict[str, Any]:
        return self.extract.identity

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return self.extract(images, self.batch_size)

    def kernel(self, one: Tensor, other: Tensor) -> Tensor:
        return cubic(one, other)


def cubic(one: Tensor, other: Tensor) -> Tensor:
    """(a, D), (b, D) -> (a, b): (x·y / D + 1)³."""
    return (one @ other.T / one.shape[1] + 1) ** 3


def make(resources: Resources) -> KernelInceptionDistance:
    """KID with its weights. Raises UserError if they are missing."""
    return KernelInceptionDistance(inception_features("kid", resources), resources.batch_size, torch.device(resources.device))
