"""Where every tensor of a diffusers pipeline lies in a single file of original (LDM, SGM) layout, and in which form.

For SD 1.x, 2.x and SDXL: U-Net, VAE, CLIP text encoder, OpenCLIP text encoder. Stages make the U-Net's map short: INxx
is input_blocks.xx and OUTxx is output_blocks.xx. What the tensors are called is the layout's definition: CompVis
stable-diffusion, Stability-AI generative-models, mlfoundations open_clip.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afa.stages.original_names import unet_names

DENOISER = "unet"  # the only one this layout is known for
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# text encoder -> its prefixes, (CLIP, OpenCLIP); SDXL's stand in conditioner.embedders
TEXT = {
    "text_encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.model."),
    "xl.text_encoder": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.model."),
    "xl.text_encoder_2": ("conditioner.embedders.1.transformer.text_model.", "conditioner.embedders.1.model."),
}
VAE_PLACES = [
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"group_norm\.", "norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
]
OPEN_CLIP = [
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
]


@dataclass(frozen=True)
class Place:
    """A tensor's name in the original layout, and its form there.

    form: "same"; "conv" (a linear layer as 1×1 convolution); "transposed"; or "q", "k", "v": that third of the rows.
    """

    key: str
    form: str = "same"


def original_places(
    part: str, names: Collection[str], *, stages: Mapping[str, str] | None = None, xl: bool = False, open_clip: bool = False
) -> dict[str, Place]:
    """The place of every tensor of one part of a pipeline.

    part: unet, vae, text_encoder or text_encoder_2. names: all of the part's own, as diffusers has them (see
    parts.today). stages: of a U-Net's, by "unet.name". xl: of an SDXL pipeline. open_clip: a text encoder that was OpenCLIP's (SD 2.x; SDXL's second).
    Raises ValueError for names that the layout has no place for.
    """
    if part == DENOISER:
        assert stages is not None
        own = {name: stages[f"{DENOISER}.{name}"] for name in names}
        return {name: Place(UNET + new) for name, new in unet_names(names, own).items()}
    if part == "vae":
        return _vae(names)
    clip, opened = TEXT[f"{'xl.' if xl else ''}{part}"]
    if open_clip:
        return {name: Place(opened + _replaced(name, OPEN_CLIP), _open_clip_form(name)) for name in names}
    return {
        name: Place((clip if not name.startswith("text_projection") else clip.removesuffix("text_model.")) + name)
        for name in names
    }


def names_by_key(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Which tensors make up each of a single file's: one, or the three thirds in the order q, k, v."""
    found: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: "qkv".find(places[name].form)):
        found.setdefault(places[name].key, []).append(name)
    return found


def from_original(tensor: Tensor, form: str) -> Tensor:
    """A tensor of a single file as diffusers has it."""
    if form in ("q", "k", "v"):
        return tensor.chunk(3)["qkv".index(form)]
    if form == "transposed":
        return tensor.T
    return tensor.flatten(1) if form == "conv" else tensor


def to_original(tensors: Sequence[Tensor], form: str) -> Tensor:
    """The reverse; three thirds are joined in the order q, k, v."""
    if form in ("q", "k", "v"):
        return torch.cat(list(tensors))
    (tensor,) = tensors
    if form == "transposed":
        return tensor.T.contiguous()
    return tensor[..., None, None] if form == "conv" else tensor


def shape_from_original(shape: Sequence[int], form: str) -> tuple[int, ...]:
    """The shape that from_original will give."""
    if form in ("q", "k", "v"):
        return (shape[0] // 3, *shape[1:])
    return tuple(reversed(shape)) if form == "transposed" else tuple(shape[:2]) if form == "conv" else tuple(shape)


def shape_to_original(shape: Sequence[int], form: str) -> tuple[int, ...]:
    """The shape that to_original will give, from that of one tensor."""
    if form in ("q", "k", "v"):
        return (3 * shape[0], *shape[1:])
    return tuple(reversed(shape)) if form == "transposed" else (*shape, 1, 1) if form == "conv" else tuple(shape)


def _vae(names: Collection[str]) -> dict[str, Place]:
    """The decoder's blocks are counted from the other end."""
    last = max(int(found[1]) for name in names if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    places = {}
    for name in names:
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda found: f"up.{last - int(found[1])}.block.", name)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f"up.{last - int(found[1])}.upsample.", new)
        linear = re.search(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name)
        places[name] = Place(VAE + _replaced(new, VAE_PLACES), "conv" if linear else "same")
    return places


def _replaced(name: str, table: list[tuple[str, str]]) -> str:
    for old, new in table:
        name = re.sub(old, new, name)
    return name


def _open_clip_form(name: str) -> str:
    third = re.search(r"\.self_attn\.([qkv])_proj\.", name)
    return third[1] if third else "transposed" if name == "text_projection.weight" else "same"
