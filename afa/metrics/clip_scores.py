"""Metrics on CLIP embeddings: CLIP-T, CLIP-I, PickScore, HPS v2, LAION aesthetic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.metrics.base import Differentiable, ImageMetric, Picture, Values
from afa.metrics.clip import VIT_L, Clip, cosines, shared_clip
from afa.metrics.open_clip import open_clip
from afa.metrics.registry import Resources
from afa.metrics.weights import FoundPart, Part, find, network_loader, read_tensors

CROP = "shorter side resized, centre crop"  # what fit="crop" does, in words


class ClipMetric(ImageMetric):
    """A metric on the embeddings of one CLIP.

    fit: one of pixels.FITS; it resizes images to the model's size
    """

    def __init__(
        self, name: str, clip: Clip, found: FoundPart, batch_size: int, source: str, fit: str = "crop"
    ) -> None:
        self.names, self.clip, self.found, self.batch_size = (name,), clip, found, batch_size
        self.source, self.fit = source, fit

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": self.fit, "weights": self.found.identity}

    def vectors(self, pictures: Sequence[Picture]) -> Any:
        """Return unit vectors (n, D) of n pictures."""
        return self.clip.images([picture.image for picture in pictures], self.batch_size, self.fit)


@dataclass(frozen=True)
class CaptionRow:
    """A metric that is the cosine of image and caption.

    part:   its weights
    opened: (found weights, device) -> Clip
    source: one sentence, with {} for the weights
    fit:    see ClipMetric
    scaled: whether the cosine is multiplied by the model's own scale
    """

    part: Part
    opened: Callable[[FoundPart, torch.device], Clip]
    source: str
    fit: str = "crop"
    scaled: bool = False


HPS = "HPS_v2.1_compressed.pt"
CAPTION_ROWS = {
    # Does the image fit its caption? In [-1, 1], about 0.2 to 0.35 for captioned images; higher is better.
    # Source: Radford et al., arXiv:2103.00020; CLIPScore (arXiv:2104.08718) without its factor 2.5 and its
    # cut at zero.
    "clip_t": CaptionRow(
        VIT_L, shared_clip, f"cosine of image and caption by {{}}, {CROP}; arXiv:2103.00020"
    ),
    # Which of two images of a caption would people pick? The logit of a CLIP trained on their choices, about
    # 18 to 24, as in its release. The sigmoid of the difference of two images is the probability that the
    # first one is picked. Source: Kirstain et al., arXiv:2305.01569. Deviation: none.
    "pickscore": CaptionRow(
        Part("PickScore", "PickScore_v1", hub="yuvalkirstain/PickScore_v1", folder=True),
        shared_clip,
        f"scale · cosine of image and caption by {{}}, {CROP}; arXiv:2305.01569",
        scaled=True,
    ),
    # How would people rank an image among others of its caption? The cosine of a CLIP ViT-H/14 trained on
    # rankings, about 0.2 to 0.35, as its release returns it (its tables show it times 100).
    # Source: Wu et al., arXiv:2306.09341, version 2.1. Deviations: float32, where the release uses mixed
    # precision; captions are not repaired by ftfy.
    "hpsv2": CaptionRow(
        Part("HPSv2", HPS, hub=f"xswu/HPSv2/{HPS}"),
        open_clip,
        "cosine of image and caption by {}, longer side resized, the rest black; arXiv:2306.09341",
        fit="pad",
    ),
}


class CaptionScore(ClipMetric, Differentiable):
    """The cosine of image and caption, by a row of CAPTION_ROWS; higher is better, within one caption."""

    def __init__(self, name: str, resources: Resources) -> None:
        row = CAPTION_ROWS[name]
        (found,) = find(name, [row.part], resources.weights)
        clip = row.opened(found, torch.device(resources.device))
        super().__init__(name, clip, found, resources.batch_size, row.source.format(found), row.fit)
        self.scaled = row.scaled

    @property
    def _factor(self) -> float:
        return self.clip.scale if self.scaled else 1.0

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        captions = self.clip.texts([picture.caption for picture in pictures], self.batch_size)
        return {self.names[0]: self._factor * cosines(self.vectors(pictures), captions)}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self._factor * self.clip.cosine_gradients(images, captions, self.fit)


# Each raises UserError if its weights are missing.
make_clip_t = partial(CaptionScore, "clip_t")
make_pickscore = partial(CaptionScore, "pickscore")
make_hpsv2 = partial(CaptionScore, "hpsv2")


class ClipImage(ClipMetric):
    """Is the image like the real one of the same caption? In [-1, 1], 1 for the real image itself.

    Every picture needs its reference. Source: Radford et al., arXiv:2103.00020; used for generated images by
    Ruiz et al., arXiv:2208.12242.
    """

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        real = [picture.reference for picture in pictures if picture.reference is not None]
        if len(real) < len(pictures):
            alone = next(picture.caption for picture in pictures if picture.reference is None)
            raise UserError(
                f"metric 'clip_i' compares with the real image of a caption, and there is none of '{alone}'; "
                "leave it out"
            )
        return {"clip_i": cosines(self.vectors(pictures), self.clip.images(real, self.batch_size))}


def make_clip_i(resources: Resources) -> ClipImage:
    """Make CLIP-I. Raises UserError if its weights are missing."""
    (found,) = find("clip_i", [VIT_L], resources.weights)
    clip = shared_clip(found, torch.device(resources.device))
    source = f"cosine of image and real image by {found}, {CROP}; arXiv:2103.00020"
    return ClipImage("clip_i", clip, found, resources.batch_size, source)


WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers in the published files; between the first of them was dropout


class ScoreHead(nn.Module):
    """A scoring head: (B, width) to (B, 1), with the published names layers.0, 2, 4, 6, 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = {
            place: nn.Linear(before, after)
            for place, before, after in zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False)
        }
        self.layers = nn.Sequential(*(linear.get(place, nn.Identity()) for place in range(max(PLACES) + 1)))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)


HEAD = Part(
    "LAION's aesthetic predictor",
    "sac+logos+ava1-l14-linearMSE.pth",
    hub="camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    sha256=("21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",),
)


class Aesthetic(ClipMetric, Differentiable):
    """How much would people like an image on average? About 1 to 10, higher is better; no caption is read.

    Five linear layers on the unit CLIP ViT-L/14 embedding. Source: LAION's improved aesthetic predictor,
    sac+logos+ava1-l14-linearMSE (github.com/christophschuhmann/improved-aesthetic-predictor). Deviation:
    float32, where the release runs CLIP in float16.
    """

    def __init__(self, clip: Clip, head: FoundPart, backbone: FoundPart, batch_size: int) -> None:
        source = f"{head} on embeddings of {backbone}, {CROP}"
        super().__init__("aesthetic", clip, backbone, batch_size, source)
        self.head = head
        self._load = network_loader(lambda: ScoreHead(768), read_tensors(head.path), head.path)

    @cached_property
    def _head(self) -> ScoreHead:
        return self._load(torch.device("cpu"))

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": self.fit, "head": self.head.identity, "clip": self.found.identity}

    @torch.no_grad()
    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        return {"aesthetic": self._head(torch.from_numpy(self.vectors(pictures)))[:, 0].double().numpy()}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self._head(self.clip.gradients(images).cpu())[:, 0]


def make_aesthetic(resources: Resources) -> Aesthetic:
    """Make the aesthetic score from two parts: the head, then CLIP. Raises UserError if one is missing."""
    head, backbone = find("aesthetic", [HEAD, VIT_L], resources.weights)
    clip = shared_clip(backbone, torch.device(resources.device))
    return Aesthetic(clip, head, backbone, resources.batch_size)
