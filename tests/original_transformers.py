"""Write SD3 and FLUX.1 transformers in the original layout of their publishers, as single files are shared."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HALVES = ("norm_out.linear", "norm1_context.linear")  # scale and shift stand the other way round; of a block: only SD3's last one
# diffusers -> original, within a block
SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {"norm.linear": "modulation.lin", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm", "proj_out": "linear2"}
FLUX_ENDS = {
    **{f"time_text_embed.{new}_embedder.linear_{number}": f"{old}_in.{layer}_layer"
       for new, old in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")) for number, layer in ((1, "in"), (2, "out"))},
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}  # fmt: skip
JOINED = {  # one original tensor from several: by the first of them
    "sd3": {"attn.to_q": ("x_block.attn.qkv", "attn.to_k", "attn.to_v"), "attn2.to_q": ("x_block.attn2.qkv", "attn2.to_k", "attn2.to_v"),
            "attn.add_q_proj": ("context_block.attn.qkv", "attn.add_k_proj", "attn.add_v_proj")},
    "double": {"attn.to_q": ("img_attn.qkv", "attn.to_k", "attn.to_v"), "attn.add_q_proj": ("txt_attn.qkv", "attn.add_k_proj", "attn.add_v_proj")},
    "single": {"attn.to_q": ("linear1", "attn.to_k", "attn.to_v", "proj_mlp")},
}  # fmt: skip
BLOCKS = {
    "sd3": (("transformer_blocks", "joint_blocks", SD3_BLOCK, "sd3"),),
    "flux": (("transformer_blocks", "double_blocks", FLUX_DOUBLE, "double"), ("single_transformer_blocks", "single_blocks", FLUX_SINGLE, "single")),
}


def write_transformer(kind: str, state: dict[str, Tensor], path: Path, prefix: str = "model.diffusion_model.", **more: Tensor) -> Path:
    """Save a transformer's state. kind: sd3 or flux. more: whatever else lies in such files."""
    found = {f"{prefix}{name}": tensor.contiguous() for name, tensor in originals(kind, state)}
    save_file({**found, **more}, path)
    return path


def originals(kind: str, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its original name."""
    if "pos_embed.pos_embed" in state:
        yield "pos_embed", state["pos_embed.pos_embed"]
    for name, original in (SD3_ENDS if kind == "sd3" else FLUX_ENDS).items():
        for end in ("weight", "bias"):
            if f"{name}.{end}" in state:
                yield f"{original}.{end}", _swapped(state[f"{name}.{end}"]) if name in HALVES else state[f"{name}.{end}"]
    for place, original, names, joined in BLOCKS[kind]:
        count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{place}."))
        for index in range(count):
            own = {name.removeprefix(f"{place}.{index}."): tensor for name, tensor in state.items() if name.startswith(f"{place}.{index}.")}
            for name, tensor in _block(own, names, JOINED[joined], last=kind == "sd3" and index == count - 1):
                yield f"{original}.{index}.{name}", tensor


def _block(state: dict[str, Tensor], names: dict[str, str], joined: dict[str, tuple[str, ...]], last: bool) -> Iterator[tuple[str, Tensor]]:
    for end in ("weight", "bias"):
        for first, (original, *others) in joined.items():
            if f"{first}.{end}" in state:
                yield f"{original}.{end}", torch.cat([state[f"{name}.{end}"] for name in (first, *others)])
        for name, original in names.items():
            tensor = state.get(f"{name}.{end}")
            if tensor is not None:
                swapped = last and name in HALVES
                yield f"{original}.{'scale' if original.endswith('_norm') else end}", _swapped(tensor) if swapped else tensor


def _swapped(tensor: Tensor) -> Tensor:
    one, other = tensor.chunk(2)
    return torch.cat([other, one])
