"""Files to inspect: small experts on the disk, and files of real size that take no place on it."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from original_layout import _vae, unet_tensors, write_single_file
from safetensors.torch import load_file, save_file
from tiny import sd_pipeline
from torch import Tensor

from afa.experts.description import describe_config

BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
UNET = {**BLOCKS, "block_out_channels": (16, 32), "layers_per_block": 1}  # nine stages: counting takes its time by the operation
CLIP = {"sd15": "cond_stage_model.transformer", "sdxl": "conditioner.embedders.0.transformer"}
OPEN_CLIP = {"sd21": ("text_encoder", "cond_stage_model.model"), "sdxl": ("text_encoder_2", "conditioner.embedders.1.model")}


def pipe(seed: int, **changes: Any) -> Any:
    """A pipeline of nine stages."""
    return sd_pipeline(seed, **{**UNET, **changes})


def write_experts(root: Path) -> Path:
    """Experts photo and paint with one text encoder, sketch with its own; photo also as a single file, with its configs."""
    for seed, (name, text) in enumerate([("photo", 7), ("paint", 7), ("sketch", 8)]):
        pipe(seed, text_seed=text).save_pretrained(root / name)
    write_single_file(pipe(0), root / "photo.safetensors")
    shutil.copytree(root / "photo", root / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


def edit(file: Path, change: Any) -> None:
    """Change the tensors of a file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def write_sparse(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A .safetensors file of tensors in half precision whose bytes are holes. tensors: only their shapes count."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def original(config: str) -> dict[str, Tensor]:
    """A real checkpoint of original layout without content: U-Net, VAE and text encoders."""
    parts: Any = describe_config("real", config).parts
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(parts["unet"]).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(parts["vae"]).items()}
    if config == "sdxl":
        for place, layer in (("0.0", parts["unet"].add_embedding.linear_1), ("0.2", parts["unet"].add_embedding.linear_2)):
            tensors |= {f"model.diffusion_model.label_emb.{place}.{name}": tensor for name, tensor in layer.state_dict().items()}
    if config in CLIP:
        for name, tensor in parts["text_encoder"].state_dict().items():
            tensors[f"{CLIP[config]}.text_model.{name.removeprefix('text_model.')}"] = tensor
    if config in OPEN_CLIP:
        part, prefix = OPEN_CLIP[config]
        tensors |= _open_clip(parts[part].config, prefix)
    return tensors


def _open_clip(config: Any, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's own names and shapes."""
    width = config.hidden_size
    shapes = {"positional_embedding": (77, width), "token_embedding.weight": (49408, width), "text_projection": (width, width)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,)}
    layer = {f"{norm}.{name}": (width,) for norm in ("ln_1", "ln_2") for name in ("weight", "bias")}
    layer |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    layer |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    layer |= {"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
    layer |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    shapes |= {
        f"transformer.resblocks.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()
    }
    return {f"{prefix}.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
