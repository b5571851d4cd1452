"""Write transformers under the names that their publishers or ComfyUI give them: the inverse of what diffusers' converters read."""

import re

import torch
from torch import Tensor

# diffusers -> published; every pattern is replaced in turn. What ends in #q, #k, #v … is joined in this order.
ORDER = "qkvmgu"
ATTENTION = [  # FLUX's double blocks and single blocks
    (r"^transformer_blocks\.(\d+)\.", r"double_blocks.\1."),
    (r"^single_transformer_blocks\.(\d+)\.", r"single_blocks.\1."),
    (r"^(double\S+)\.attn\.to_([qkv])\.(weight|bias)$", r"\1.img_attn.qkv.\3#\2"),
    (r"^(double\S+)\.attn\.add_([qkv])_proj\.(weight|bias)$", r"\1.txt_attn.qkv.\3#\2"),
    (r"^(double\S+)\.attn\.to_out\.0\.", r"\1.img_attn.proj."),
    (r"^(double\S+)\.attn\.to_add_out\.", r"\1.txt_attn.proj."),
    (r"^(double\S+)\.attn\.norm_([qk])\.weight$", r"\1.img_attn.norm.\2_norm.scale"),
    (r"^(double\S+)\.attn\.norm_added_([qk])\.weight$", r"\1.txt_attn.norm.\2_norm.scale"),
    (r"^(single\S+)\.attn\.norm_([qk])\.weight$", r"\1.norm.\2_norm.scale"),
    (r"\.q_norm\.scale$", ".query_norm.scale"),
    (r"\.k_norm\.scale$", ".key_norm.scale"),
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^proj_out\.", "final_layer.linear."),
]
NAMES = {
    "flux2": [
        *ATTENTION,
        (r"^(double\S+)\.ff\.linear_in\.", r"\1.img_mlp.0."),
        (r"^(double\S+)\.ff\.linear_out\.", r"\1.img_mlp.2."),
        (r"^(double\S+)\.ff_context\.linear_in\.", r"\1.txt_mlp.0."),
        (r"^(double\S+)\.ff_context\.linear_out\.", r"\1.txt_mlp.2."),
        (r"^(single\S+)\.attn\.to_qkv_mlp_proj\.", r"\1.linear1."),
        (r"^(single\S+)\.attn\.to_out\.", r"\1.linear2."),
        (r"^time_guidance_embed\.(time|guidance)(?:step)?_embedder\.linear_1\.", r"\1_in.in_layer."),
        (r"^time_guidance_embed\.(time|guidance)(?:step)?_embedder\.linear_2\.", r"\1_in.out_layer."),
        (r"^((?:double|single)_stream_modulation\w*)\.linear\.", r"\1.lin."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    ],
    "chroma": [
        *ATTENTION,
        (r"^(double\S+)\.ff\.net\.0\.proj\.", r"\1.img_mlp.0."),
        (r"^(double\S+)\.ff\.net\.2\.", r"\1.img_mlp.2."),
        (r"^(double\S+)\.ff_context\.net\.0\.proj\.", r"\1.txt_mlp.0."),
        (r"^(double\S+)\.ff_context\.net\.2\.", r"\1.txt_mlp.2."),
        (r"^(single\S+)\.attn\.to_([qkv])\.(weight|bias)$", r"\1.linear1.\3#\2"),
        (r"^(single\S+)\.proj_mlp\.(weight|bias)$", r"\1.linear1.\2#m"),
        (r"^(single\S+)\.proj_out\.", r"\1.linear2."),
        (r"^(distilled\S+)\.linear_1\.", r"\1.in_layer."),
        (r"^(distilled\S+)\.linear_2\.", r"\1.out_layer."),
        (r"^(distilled\S+\.norms\.\d+)\.weight$", r"\1.scale"),
    ],
    "z-image": [
        (r"^all_(x_embedder|final_layer)\.2-1\.", r"\1."),
        (r"\.attention\.to_([qkv])\.weight$", r".attention.qkv.weight#\1"),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    ],
    "qwen-image": [],
    "lumina2": [
        (r"\.attn\.to_([qkv])\.weight$", r".attention.qkv.weight#\1"),
        (r"\.attn\.to_out\.0\.", ".attention.out."),
        (r"\.attn\.norm_([qk])\.", r".attention.\1_norm."),
        (r"\.feed_forward\.linear_(\d)\.", r".feed_forward.w\1."),
        (r"\.norm1\.linear\.", ".adaLN_modulation.1."),
        (r"\.norm1\.(norm\.)?weight$", ".attention_norm1.weight"),
        (r"\.norm2\.weight$", ".attention_norm2.weight"),
        (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
        (r"^time_caption_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_caption_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^norm_out\.linear_1\.", "final_layer.adaLN_modulation.1."),
        (r"^norm_out\.linear_2\.", "final_layer.linear."),
    ],
    "krea2": [
        (r"^transformer_blocks\.", "blocks."),
        (r"^text_fusion\.", "txtfusion."),
        (r"^img_in\.", "first."),
        (r"^time_embed\.linear_1\.", "tmlp.0."),
        (r"^time_embed\.linear_2\.", "tmlp.2."),
        (r"^time_mod_proj\.", "tproj.1."),
        (r"^txt_in\.norm\.weight$", "txtmlp.0.scale"),
        (r"^txt_in\.linear_1\.", "txtmlp.1."),
        (r"^txt_in\.linear_2\.", "txtmlp.3."),
        (r"^final_layer\.linear\.", "last.linear."),
        (r"^final_layer\.norm\.weight$", "last.norm.scale"),
        (r"^final_layer\.scale_shift_table$", "last.modulation.lin"),
        (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
        (r"\.attn\.to_out\.0\.", ".attn.wo."),
        (r"\.attn\.to_gate\.", ".attn.gate."),
        (r"\.attn\.norm_([qk])\.weight$", r".attn.qknorm.\1norm.scale"),
        (r"\.ff\.", ".mlp."),
        (r"\.norm1\.weight$", ".prenorm.scale"),
        (r"\.norm2\.weight$", ".postnorm.scale"),
        (r"\.scale_shift_table$", ".mod.lin"),
    ],
    "qwen-image-2.1": [
        (r"\.img_mlp\.gate_layer\.weight$", r".img_mlp.gate_up.weight#g"),
        (r"\.img_mlp\.proj\.weight$", r".img_mlp.gate_up.weight#u"),
    ],
}


def published(family: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of a transformer under its published name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        for pattern, new in NAMES[family]:
            name = re.sub(pattern, new, name)
        key, _, place = name.partition("#")
        parts.setdefault(key, {})[place] = _shaped(family, key, tensor)
    return {key: torch.cat([own[place] for place in sorted(own, key=ORDER.find)]) for key, own in parts.items()}


def _shaped(family: str, key: str, tensor: Tensor) -> Tensor:
    """FLUX.2 has scale and shift the other way round, Krea 2 the six modulations of a block in one vector."""
    if family == "flux2" and key == "final_layer.adaLN_modulation.1.weight":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.flatten() if key.endswith(".mod.lin") else tensor
