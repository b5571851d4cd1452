"""Write a diffusers pipeline as one .safetensors file in the original (LDM) layout, as the community shares them.

Stages make the U-Net's map short: INxx is input_blocks.xx and OUTxx is output_blocks.xx.
"""

import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from afa.models.unet_stages import stages

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = [
    (r"(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)", r"\1.down.\2.block.\3"),
    (r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0", r"\1.down.\2.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_q", "q"),
    (r"to_k", "k"),
    (r"to_v", "v"),
    (r"to_out\.0", "proj_out"),
]


def write_single_file(pipe, path: Path, vae: bool = True) -> Path:
    """Save U-Net, VAE and text encoder(s) of an SD 1.x or SDXL pipeline under their original names."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(pipe.unet).items()}
    if vae:
        tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(pipe.vae).items()}
    clip = pipe.text_encoder.state_dict()
    tensors |= {f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def unet_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a U-Net under its original name."""
    places: list[tuple[str, nn.Module]] = []
    for stage in stages(unet):
        number = int(stage.name.lstrip("INOUTM"))
        if stage.name == "M00":
            middle = unet.mid_block
            places += [("middle_block.0", middle.resnets[0]), ("middle_block.1", middle.attentions[0]), ("middle_block.2", middle.resnets[1])]
            continue
        block = f"{'input' if stage.name.startswith('IN') else 'output'}_blocks.{number}"
        body = [module for module in stage.modules() if module not in (unet.conv_norm_out, unet.conv_act, unet.conv_out)]
        places += [(f"{block}.{position}", module) for position, module in enumerate(body)]
    places += [("time_embed.0", unet.time_embedding.linear_1), ("time_embed.2", unet.time_embedding.linear_2)]
    if getattr(unet, "add_embedding", None) is not None:  # SDXL
        places += [("label_emb.0.0", unet.add_embedding.linear_1), ("label_emb.0.2", unet.add_embedding.linear_2)]
    places += [("out.0", unet.conv_norm_out), ("out.2", unet.conv_out)]
    return {f"{place}.{_inner(module, name)}": tensor for place, module in places for name, tensor in module.state_dict().items()}


def _inner(module: nn.Module, name: str) -> str:
    kind, (first, _, rest) = type(module).__name__, name.partition(".")
    if kind == "ResnetBlock2D":
        return f"{RESNET[first]}.{rest}"
    return name.replace("conv.", "op.") if kind == "Downsample2D" else name


def _vae(vae: nn.Module) -> dict[str, Tensor]:
    last = len(vae.decoder.up_blocks) - 1
    renamed = {}
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda match: f"up.{last - int(match[1])}.block.{match[2]}", name)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{last - int(match[1])}.upsample", new)
        for pattern, replacement in VAE:
            new = re.sub(pattern, replacement, new)
        in_attention = "attn_1" in new and new.endswith("weight") and tensor.ndim == 2
        renamed[new] = tensor[..., None, None] if in_attention else tensor
    return renamed
