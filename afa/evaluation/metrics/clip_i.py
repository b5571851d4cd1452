"""CLIP-I: is the image like the real one of the same caption? The cosine of their CLIP embeddings.

Source: Radford et al., arXiv:2103.00020; used for generated images by Ruiz et al., arXiv:2208.12242.
"""

from collections.abc import Sequence
from typing import Any

import torch

from afa.errors import UserError
from afa.evaluation.metrics.base import ImageMetric, Values
from afa.evaluation.metrics.clip import VIT_L, Clip, cosines, shared_clip
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, find
from afa.evaluation.pictures import Picture


class ClipImage(ImageMetric):
    """In [-1, 1], 1 for the real image itself; higher is better. Every picture needs its reference."""

    names = ("clip_i",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = f"cosine of image and real image by {found}, shorter side resized, centre crop; arXiv:2103.00020"

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        real = [picture.reference for picture in pictures if picture.reference is not None]
        if len(real) < len(pictures):
            alone = next(picture.caption for picture in pictures if picture.reference is None)
            raise UserError(f"metric 'clip_i' compares with the real image of a caption, and there is none of '{alone}'; leave it out")
        made = self.clip.images([picture.image for picture in pictures], self.batch_size)
        return {"clip_i": cosines(made, self.clip.images(real, self.batch_size))}


def make(resources: Resources) -> ClipImage:
    """CLIP-I with its weights. Raises UserError if they are missing."""
    (found,) = find("clip_i", [VIT_L], resources.weights)
    return ClipImage(shared_clip(found, torch.device(resources.device)), found, resources.batch_size)
