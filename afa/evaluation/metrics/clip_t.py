"""CLIP-T: does the image fit its caption? The cosine of their CLIP embeddings.

Source: Radford et al., arXiv:2103.00020; as CLIPScore (arXiv:2104.08718) without its factor 2.5 and its cut at zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afa.evaluation.metrics.base import Differentiable, ImageMetric, Values
from afa.evaluation.metrics.clip import VIT_L, Clip, shared_clip
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, find
from afa.evaluation.pictures import Picture


class ClipText(ImageMetric, Differentiable):
    """In [-1, 1], about 0.2 to 0.35 for captioned images; higher is better."""

    names = ("clip_t",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = f"cosine of image and caption by {found}, shorter side resized, centre crop; arXiv:2103.00020"

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images, captions = [picture.image for picture in pictures], [picture.caption for picture in pictures]
        return {"clip_t": self.clip.cosines(images, captions, self.batch_size)}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.clip.cosine_gradients(images, captions)


def make(resources: Resources) -> ClipText:
    """CLIP-T with its weights. Raises UserError if they are missing."""
    (found,) = find("clip_t", [VIT_L], resources.weights)
    return ClipText(shared_clip(found, torch.device(resources.device)), found, resources.batch_size)
