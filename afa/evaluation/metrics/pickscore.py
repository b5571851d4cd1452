"""PickScore: which of two images of a caption would people pick? The logit of a CLIP trained on their choices.

Source: Kirstain et al., arXiv:2305.01569; scale · cosine, as in its release (about 18 to 24). Deviation: none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afa.evaluation.metrics.base import Differentiable, ImageMetric, Values
from afa.evaluation.metrics.clip import Clip, shared_clip
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find
from afa.evaluation.pictures import Picture

WEIGHTS = Part("PickScore", "PickScore_v1", hub="yuvalkirstain/PickScore_v1", folder=True)


class PickScore(ImageMetric, Differentiable):
    """A logit, within ± the model's scale; higher is better, by the sigmoid of the difference within one caption."""

    names = ("pickscore",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = f"scale · cosine of image and caption by {found}, shorter side resized, centre crop; arXiv:2305.01569"

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images, captions = [picture.image for picture in pictures], [picture.caption for picture in pictures]
        return {"pickscore": self.clip.scale * self.clip.cosines(images, captions, self.batch_size)}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.clip.scale * self.clip.cosine_gradients(images, captions)


def make(resources: Resources) -> PickScore:
    """PickScore with its weights. Raises UserError if they are missing."""
    (found,) = find("pickscore", [WEIGHTS], resources.weights)
    return PickScore(shared_clip(found, torch.device(resources.device)), found, resources.batch_size)
