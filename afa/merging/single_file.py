"""Where every tensor of a diffusers model lies in a single file of its publisher's layout, and in which form.

For whole checkpoints of SD 1.x, 2.x and XL (U-Net, VAE, CLIP and OpenCLIP text encoders), and transformers
(experts/transformer_places.py). What tensors are called is the layout's definition: CompVis stable-diffusion,
Stability-AI generative-models, mlfoundations open_clip. Held against diffusers' converters by
tests/test_merging_layout.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from afa.experts.layouts import DENOISER, VAE
from afa.experts.transformer_places import Place, transformer_places
from afa.models.registry import stages_of
from afa.stages.original_names import unet_names

# text encoder -> its prefixes, (CLIP, OpenCLIP); SDXL's stand in conditioner.embedders
TEXT = {
    "text_encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.model."),
    "xl.text_encoder": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.model."),
    "xl.text_encoder_2": (
        "conditioner.embedders.1.transformer.text_model.",
        "conditioner.embedders.1.model.",
    ),
}
VAE_NAMES = [
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


def original_places(
    part: str,
    shapes: Mapping[str, Sequence[int]],
    model: Any = None,
    *,
    xl: bool = False,
    open_clip: bool = False,
) -> dict[str, Place]:
    """The place of every tensor of one part of a pipeline.

    part:      unet, transformer, vae, text_encoder or text_encoder_2
    shapes:    of all of the part's own tensors, by the names that diffusers has today
    model:     of a denoiser, with or without numbers
    xl:        of an SDXL pipeline
    open_clip: a text encoder that was OpenCLIP's (SD 2.x; SDXL's second)
    Raises ValueError for names that the layout has no place for.
    """
    if part == "unet":
        return {
            name: Place(DENOISER + new) for name, new in unet_names(shapes, stages_of(shapes, model)).items()
        }
    if part == "transformer":
        found = transformer_places(shapes, model)
        return {name: replace(place, key=DENOISER + place.key) for name, place in found.items()}
    if part == "vae":
        return _vae(shapes)
    clip, opened = TEXT[f"{'xl.' if xl else ''}{part}"]
    if open_clip:
        return {name: _open_clip(name, opened, shape[0]) for name, shape in shapes.items()}
    outer = clip.removesuffix("text_model.")
    return {name: Place((outer if name.startswith("text_projection") else clip) + name) for name in shapes}


def _vae(shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
    """The decoder's blocks are counted from the other end."""
    last = max(int(found[1]) for name in shapes if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    places = {}
    for name in shapes:
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda found: f"up.{last - int(found[1])}.block.", name)
        new = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f"up.{last - int(found[1])}.upsample.", new
        )
        linear = re.search(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name)
        places[name] = Place(VAE + _replaced(new, VAE_NAMES), "conv" if linear else "same")
    return places


def _open_clip(name: str, prefix: str, rows: int) -> Place:
    """Of a CLIP text encoder that was OpenCLIP's: queries, keys and values are thirds of one tensor."""
    third = re.search(r"\.self_attn\.([qkv])_proj\.", name)
    number = "qkv".index(third[1]) if third else 0
    form = "transposed" if name == "text_projection.weight" else "same"
    return Place(
        prefix + _replaced(name, OPEN_CLIP), form, (number * rows, (number + 1) * rows) if third else None
    )


def _replaced(name: str, table: list[tuple[str, str]]) -> str:
    for old, new in table:
        name = re.sub(old, new, name)
    return name
