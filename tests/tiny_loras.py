"""Tiny LoRA files of every family, in the forms that diffusers and kohya's scripts write."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import sd_pipeline, sdxl_pipeline
from tiny_krea2 import KREA2_SMALL, krea2_pipeline
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_transformers import FLUX_SMALL, SD3_SMALL, flux_pipeline, sd3_pipeline
from torch import nn

TEXT = ["q_proj", "v_proj"]  # of CLIP


@dataclass(frozen=True)
class Family:
    """pipeline(seed, text_seed=): a whole one. component: the denoiser's name. targets: its layers that get a LoRA.

    encoders: the text encoders that diffusers' loader reads a LoRA for.
    """

    pipeline: Callable[..., Any]
    component: str
    targets: tuple[str, ...]
    encoders: tuple[str, ...]

    def denoiser(self, pipe: Any) -> Any:
        return getattr(pipe, self.component)


FAMILIES = {
    "sd": Family(sd_pipeline, "unet", ("to_q", "to_v", "ff.net.2", "conv1", "conv_in", "conv_out", "linear_1"), ("text_encoder",)),
    "sdxl": Family(sdxl_pipeline, "unet", ("to_k", "to_out.0"), ("text_encoder", "text_encoder_2")),
    "sd3": Family(
        functools.partial(sd3_pipeline, **SD3_SMALL), "transformer", ("to_q", "to_v", "add_k_proj"), ("text_encoder", "text_encoder_2")
    ),
    "flux": Family(functools.partial(flux_pipeline, **FLUX_SMALL), "transformer", ("to_q", "to_v", "proj_out"), ("text_encoder",)),
    "krea2": Family(functools.partial(krea2_pipeline, **KREA2_SMALL), "transformer", ("to_q", "to_gate", "ff.up", "final_layer.linear"), ()),
    "lumina2": Family(functools.partial(lumina2_pipeline, **LUMINA2_SMALL), "transformer", ("to_q", "linear_1", "linear_2", "caption_embedder.1"), ()),
}


def _random(module: nn.Module, targets: list[str], rank: int, **how: Any) -> dict[str, torch.Tensor]:
    """A LoRA of a model's layers, large enough to be seen."""
    module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **how))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    if hasattr(module, "peft_config"):
        return {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(module).items()}
    return {name: tensor.contiguous() for name, tensor in module.get_adapter_state_dict().items()}


def write_lora(name: str, path: Path, seed: int = 0, text: bool = False, rank: int = 2, **how: Any) -> Path:
    """As diffusers saves it. text: with its text encoders' part. how: of peft's LoraConfig."""
    family, pipe = FAMILIES[name], FAMILIES[name].pipeline(0)
    torch.manual_seed(seed)
    layers = {f"{family.component}_lora_layers": _random(family.denoiser(pipe), list(family.targets), rank, **how)}
    for encoder in family.encoders if text else ():
        layers[f"{encoder}_lora_layers"] = _random(getattr(pipe, encoder), TEXT, rank, **how)
    type(pipe).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


def write_kohya(name: str, path: Path, seed: int = 0, rank: int = 2, alpha: float = 1.0) -> Path:
    """As kohya's scripts write it: layers by their names in diffusers for U-Nets, in the original layout for FLUX, with alpha."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (inputs, outputs) in KOHYA[name].items():
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator) * 0.3
        tensors[f"{layer}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


KOHYA = {  # layer -> numbers in and out
    "sd": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (32, 32),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (24, 32),
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj": (24, 24),
        "lora_te_text_model_encoder_layers_1_self_attn_out_proj": (24, 24),
    },
    "sdxl": {
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q": (32, 32),
        "lora_unet_output_blocks_0_1_transformer_blocks_1_attn2_to_v": (40, 32),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (16, 32),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (16, 16),
        "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": (24, 24),
    },
    "flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": (32, 96),
        "lora_unet_single_blocks_1_linear2": (160, 32),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (16, 16),
    },
}
