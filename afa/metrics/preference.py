"""Preference and aesthetic scores on CLIP: PickScore, HPS v2, LAION aesthetic.

pickscore: which of two images of a caption people would pick; the logit of a CLIP trained on their choices:
scale · cosine, as in its release (about 18 to 24). Source: Kirstain et al., arXiv:2305.01569. Deviation:
none.

hpsv2: how people would rank an image among others of its caption; the cosine of a CLIP ViT-H/14 trained on
rankings, as its release returns it (its tables show it times 100). Source: Wu et al., arXiv:2306.09341,
version 2.1. Deviations: float32, where the release uses mixed precision; captions are not repaired by ftfy.

aesthetic: how much people would like an image on average, about 1 to 10; it does not read the caption. Five
linear layers on the unit CLIP ViT-L/14 embedding. Source: LAION's improved aesthetic predictor,
sac+logos+ava1-l14-linearMSE (github.com/christophschuhmann/improved-aesthetic-predictor). Deviation: float32,
where the release runs CLIP in float16.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.metrics.base import Differentiable, ImageMetric, Picture, Values
from afa.metrics.clip import VIT_L, Clip, shared_clip
from afa.metrics.registry import Resources
from afa.metrics.weights import (
    Found,
    Part,
    check_network,
    check_transformer,
    find,
    load_network,
    load_transformer,
    read_tensors,
)

PICKSCORE_WEIGHTS = Part("PickScore", "PickScore_v1", hub="yuvalkirstain/PickScore_v1", folder=True)


class PickScore(ImageMetric, Differentiable):
    """PickScore: a logit within ± the model's scale; higher is better, within one caption.

    The sigmoid of the difference of two images is the probability that the first one is picked.
    """

    names = ("pickscore",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = (
            f"scale · cosine of image and caption by {found}, shorter side resized, centre crop; "
            "arXiv:2305.01569"
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images, captions = [picture.image for picture in pictures], [picture.caption for picture in pictures]
        return {"pickscore": self.clip.scale * self.clip.cosines(images, captions, self.batch_size)}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.clip.scale * self.clip.cosine_gradients(images, captions)


def make_pickscore(resources: Resources) -> PickScore:
    """Make PickScore. Raises UserError if its weights are missing."""
    (found,) = find("pickscore", [PICKSCORE_WEIGHTS], resources.weights)
    return PickScore(shared_clip(found, torch.device(resources.device)), found, resources.batch_size)


VISION_HEAD, TEXT_HEAD = 80, 64  # widths of a ViT-H/14's attention heads, which no tensor shows
TOWERS = {"visual.": "vision_model.", "": "text_model."}
BLOCKS = [
    (r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
    **{f"visual.ln_pre.{kind}": f"vision_model.pre_layrnorm.{kind}" for kind in ("weight", "bias")},
    **{f"visual.ln_post.{kind}": f"vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")},
    **{f"ln_final.{kind}": f"text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")},
}
# Stored the other way round.
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's tensors to CLIPModel's names and split the joined query, key and value.

    Other tensors are left out.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in NAMES:
            found[NAMES[name]] = tensor
        elif name in PROJECTIONS:
            found[PROJECTIONS[name]] = tensor.T.contiguous()
        elif ".resblocks." in name:
            found |= _block(name, tensor)
    return found


def _block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Convert one tensor of a transformer block: three tensors if it holds query, key and value."""
    old = next(prefix for prefix in TOWERS if name.startswith(prefix))
    new = TOWERS[old] + name.removeprefix(old)
    for pattern, replacement in BLOCKS:
        new = re.sub(pattern, replacement, new)
    start, joined, kind = new.partition(".attn.in_proj_")
    if not joined:
        return {new: tensor}
    return {
        f"{start}.self_attn.{part}_proj.{kind}": piece
        for part, piece in zip("qkv", tensor.chunk(3), strict=True)
    }


def read_config(tensors: Mapping[str, Tensor], where: Path) -> Any:
    """Return the CLIPConfig of an open_clip checkpoint, with sizes read from its tensors.

    Raises UserError if it is not an open_clip CLIP with a vision transformer.
    """
    from transformers import CLIPConfig

    try:
        (width, _, patch, _), (places, _) = (
            tensors["visual.conv1.weight"].shape,
            tensors["visual.positional_embedding"].shape,
        )
        (words, text_width), (length, _) = (
            tensors["token_embedding.weight"].shape,
            tensors["positional_embedding"].shape,
        )
        projected = tensors["text_projection"].shape[1]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{where} is no CLIP checkpoint of open_clip (looked for {error}); is it the right file?"
        ) from error
    shared = {"hidden_act": "gelu", "projection_dim": projected}
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    image = {"image_size": round((places - 1) ** 0.5) * patch, "patch_size": patch}
    text = {"vocab_size": words, "max_position_embeddings": length, **ends}
    return CLIPConfig(
        vision_config={**_tower(tensors, "visual.", width, VISION_HEAD), **shared, **image},
        text_config={**_tower(tensors, "", text_width, TEXT_HEAD), **shared, **text},
        projection_dim=projected,
    )


def _tower(tensors: Mapping[str, Tensor], prefix: str, width: int, head: int) -> dict[str, int]:
    start = f"{prefix}transformer.resblocks."
    blocks = {name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)}
    inner = tensors[f"{start}0.mlp.c_fc.weight"].shape[0]
    sizes = {"hidden_size": width, "num_hidden_layers": len(blocks), "num_attention_heads": width // head}
    return {**sizes, "intermediate_size": inner}


def open_clip(file: Path, device: torch.device) -> Clip:
    """Return the CLIP of a checkpoint, which is checked now and loaded when first used.

    Raises UserError if it is not a CLIP, or weights are missing.
    """
    from transformers import CLIPModel

    tensors = read_tensors(file)  # mapped, not read
    config = read_config(tensors, file)
    check_transformer(CLIPModel, config, to_transformers(tensors), file)
    return Clip(
        lambda: load_transformer(CLIPModel, config, to_transformers(read_tensors(file)), file, device)
    )


NAME = "HPS_v2.1_compressed.pt"
HPSV2_WEIGHTS = Part("HPSv2", NAME, hub=f"xswu/HPSv2/{NAME}")


class HumanPreference(ImageMetric, Differentiable):
    """HPS v2: a cosine, about 0.2 to 0.35; higher is better, within one caption."""

    names = ("hpsv2",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = (
            f"cosine of image and caption by {found}, longer side resized, the rest black; arXiv:2306.09341"
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "pad", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images, captions = [picture.image for picture in pictures], [picture.caption for picture in pictures]
        return {"hpsv2": self.clip.cosines(images, captions, self.batch_size, fit="pad")}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.clip.cosine_gradients(images, captions, fit="pad")


def make_hpsv2(resources: Resources) -> HumanPreference:
    """Make HPS v2. Raises UserError if its weights are missing."""
    (found,) = find("hpsv2", [HPSV2_WEIGHTS], resources.weights)
    return HumanPreference(open_clip(found.path, torch.device(resources.device)), found, resources.batch_size)


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


WIDTH = 768
HEAD = Part(
    "LAION's aesthetic predictor",
    "sac+logos+ava1-l14-linearMSE.pth",
    hub="camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    sha256=("21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",),
)


class Aesthetic(ImageMetric, Differentiable):
    """The LAION aesthetic score: about 1 to 10, higher is better."""

    names = ("aesthetic",)

    def __init__(self, clip: Clip, head: Found, backbone: Found, batch_size: int) -> None:
        self.clip, self.found, self.backbone, self.batch_size = clip, head, backbone, batch_size
        self.source = f"{head} on embeddings of {backbone}, shorter side resized, centre crop"
        check_network(self._build, read_tensors(head.path), head.path)

    @staticmethod
    def _build() -> ScoreHead:
        return ScoreHead(WIDTH)

    @cached_property
    def _head(self) -> ScoreHead:
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


def make_aesthetic(resources: Resources) -> Aesthetic:
    """Make the aesthetic score from two parts: the head, then CLIP. Raises UserError if one is missing."""
    head, backbone = find("aesthetic", [HEAD, VIT_L], resources.weights)
    return Aesthetic(
        shared_clip(backbone, torch.device(resources.device)), head, backbone, resources.batch_size
    )
