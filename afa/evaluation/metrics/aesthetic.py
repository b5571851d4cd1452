"""Aesthetic score: how much people would like the image on average, about 1 to 10, whatever its caption.

Source: LAION's improved aesthetic predictor, sac+logos+ava1-l14-linearMSE: five linear layers on the unit CLIP ViT-L/14
embedding (github.com/christophschuhmann/improved-aesthetic-predictor). Deviation: float32, where it ran CLIP in float16.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from afa.evaluation.metrics.base import Differentiable, ImageMetric, Values
from afa.evaluation.metrics.clip import VIT_L, Clip, shared_clip
from afa.evaluation.metrics.head import Head
from afa.evaluation.metrics.loading import check_network, load_network, read_tensors
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find
from afa.evaluation.pictures import Picture

WIDTH = 768
HEAD = Part(
    "LAION's aesthetic predictor",
    "sac+logos+ava1-l14-linearMSE.pth",
    hub="camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    sha256=("21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",),
)


class Aesthetic(ImageMetric, Differentiable):
    """About 1 to 10, higher is better."""

    names = ("aesthetic",)

    def __init__(self, clip: Clip, head: Found, backbone: Found, batch_size: int) -> None:
        self.clip, self.found, self.backbone, self.batch_size = clip, head, backbone, batch_size
        self.source = f"{head} on embeddings of {backbone}, shorter side resized, centre crop"
        check_network(self._build, read_tensors(head.path), head.path)

    @staticmethod
    def _build() -> Head:
        return Head(WIDTH)

    @cached_property
    def _head(self) -> Head:
        return load_network(self._build, read_tensors(self.found.path), torch.device("cpu"))

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "head": self.found.identity, "clip": self.backbone.identity}

    @torch.no_grad()
    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        vectors = self.clip.images([picture.image for picture in pictures], self.batch_size)
        return {"aesthetic": self._head(torch.from_numpy(vectors))[:, 0].double().numpy()}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self._head(self.clip.gradients(images).cpu())[:, 0]


def make(resources: Resources) -> Aesthetic:
    """The aesthetic score with its two weights: the head, then CLIP. Raises UserError if they are missing."""
    head, backbone = find("aesthetic", [HEAD, VIT_L], resources.weights)
    return Aesthetic(shared_clip(backbone, torch.device(resources.device)), head, backbone, resources.batch_size)
