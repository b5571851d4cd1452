"""CLIPs of open_clip as CLIPModel of transformers: other names; query, key and value in one tensor."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.metrics.clip import Clip
from afa.metrics.weights import FoundPart, read_tensors, transformer_loader

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


def open_clip(found: FoundPart, device: torch.device) -> Clip:
    """Return the CLIP of a checkpoint, which is checked now and loaded when first used.

    Raises UserError if it is not a CLIP, or weights are missing.
    """
    from transformers import CLIPModel

    tensors = read_tensors(found.path)  # mapped, not read
    config = read_config(tensors, found.path)
    return Clip(transformer_loader(CLIPModel, config, to_transformers(tensors), found.path), device)
