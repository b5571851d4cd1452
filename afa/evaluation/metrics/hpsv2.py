"""HPSv2: how people would rank the image among others of its caption, by a CLIP ViT-H/14 trained on their rankings.

Source: Wu et al., arXiv:2306.09341, version 2.1; the cosine, as its release returns it (its tables show it times 100).
Deviations: float32, where the release runs in mixed precision; captions are not repaired by ftfy before they are split.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afa.evaluation.metrics.base import Differentiable, ImageMetric, Values
from afa.evaluation.metrics.clip import Clip
from afa.evaluation.metrics.open_clip import open_clip
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find
from afa.evaluation.pictures import Picture

NAME = "HPS_v2.1_compressed.pt"
WEIGHTS = Part("HPSv2", NAME, hub=f"xswu/HPSv2/{NAME}")


class HumanPreference(ImageMetric, Differentiable):
    """A cosine, about 0.2 to 0.35; higher is better, within one caption."""

    names = ("hpsv2",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = f"cosine of image and caption by {found}, longer side resized, the rest black; arXiv:2306.09341"

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "pad", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images, captions = [picture.image for picture in pictures], [picture.caption for picture in pictures]
        return {"hpsv2": self.clip.cosines(images, captions, self.batch_size, fit="pad")}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.clip.cosine_gradients(images, captions, fit="pad")


def make(resources: Resources) -> HumanPreference:
    """HPSv2 with its weights. Raises UserError if they are missing."""
    (found,) = find("hpsv2", [WEIGHTS], resources.weights)
    return HumanPreference(open_clip(found.path, torch.device(resources.device)), found, resources.batch_size)
