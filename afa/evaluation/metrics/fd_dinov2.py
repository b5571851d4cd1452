"""FD-DINOv2: the Fréchet distance on features of DINOv2, which people's judgements follow more closely than Inception's.

Source: Stein et al., arXiv:2306.04675; features: the class token of DINOv2 ViT-L/14 at 224 px. Deviation: none.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from afa.evaluation.metrics.base import Features, batches
from afa.evaluation.metrics.frechet import FrechetDistance
from afa.evaluation.metrics.loading import check_folder, load_folder
from afa.evaluation.metrics.pixels import IMAGENET_MEAN, IMAGENET_STD, stretch, to_tensor
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find

WEIGHTS = Part("DINOv2 ViT-L/14", "dinov2-large", hub="facebook/dinov2-large", folder=True)
SIDE = 224


class DinoDistance(FrechetDistance):
    """The Fréchet distance on DINOv2's class tokens. 0 and above, lower is better."""

    name = "fd_dinov2"

    def __init__(self, found: Found, batch_size: int, device: torch.device) -> None:
        from transformers import Dinov2Model

        self.found, self.batch_size, self.device = found, batch_size, device
        self.source = f"Fréchet distance on class tokens of {found}, images stretched to {SIDE} px (bicubic); arXiv:2306.04675"
        check_folder(Dinov2Model, found.path)

    @property
    def identity(self) -> dict[str, Any]:
        return {"features": "dinov2-class-token", "preprocessing": f"stretch-{SIDE}", "weights": self.found.identity}

    @cached_property
    def _network(self) -> Any:
        from transformers import Dinov2Model

        return load_folder(Dinov2Model, self.found.path, self.device)

    @torch.no_grad()
    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return np.concatenate([self._tokens(batch) for batch in batches(images, self.batch_size)])

    def _tokens(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        pixels = to_tensor([stretch(image, SIDE) for image in images], IMAGENET_MEAN, IMAGENET_STD)
        return self._network(pixel_values=pixels.to(self.device)).pooler_output.cpu().numpy()


def make(resources: Resources) -> DinoDistance:
    """FD-DINOv2 with its weights. Raises UserError if they are missing."""
    (found,) = find("fd_dinov2", [WEIGHTS], resources.weights)
    return DinoDistance(found, resources.batch_size, torch.device(resources.device))
