"""CMMD: the distance to real images through CLIP, without a Gaussian assumption; steady for a few thousand images.

Source: Jayasumana et al., arXiv:2401.09603: k(x, y) = exp(-|x - y|² / 2·10²) on unit vectors, pairs of an image with itself
counted, times 1000. Deviation: resized by Pillow (bicubic, antialiased), which rounds to whole pixel values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.evaluation.metrics.base import Features
from afa.evaluation.metrics.clip import Clip, shared_clip
from afa.evaluation.metrics.mmd import Discrepancy, double_device
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find

WEIGHTS = Part("CLIP ViT-L/14 at 336 px", "clip-vit-large-patch14-336", hub="openai/clip-vit-large-patch14-336", folder=True)
SIGMA = 10


class ClipDiscrepancy(Discrepancy):
    """The MMD² of CLIP embeddings with a Gaussian kernel, times 1000. 0 and above, lower is better."""

    name = "cmmd"
    unbiased = False
    scale = 1000.0

    def __init__(self, clip: Clip, found: Found, batch_size: int, device: torch.device) -> None:
        self.clip, self.found, self.batch_size, self.device = clip, found, batch_size, double_device(device)
        self.source = f"1000 · MMD², Gaussian kernel of width 10, on embeddings of {found}, images stretched to its side; arXiv:2401.09603"

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


def make(resources: Resources) -> ClipDiscrepancy:
    """CMMD with its weights. Raises UserError if they are missing."""
    (found,) = find("cmmd", [WEIGHTS], resources.weights)
    device = torch.device(resources.device)
    return ClipDiscrepancy(shared_clip(found, device), found, resources.batch_size, device)
