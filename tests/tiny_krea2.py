"""Tiny Krea 2 models and pipelines of the real classes: a stack of layers of Qwen3-VL, one sequence of text and image tokens."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from tiny_transformers import call, frame_vae, lively, qwen_tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

KREA2 = {
    "in_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 24,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 32,
    "axes_dims_rope": (4, 6, 6),
}
KREA2_SMALL = {"num_layers": 2}  # K00, K01, OUT
LAYERS = (1, 2, 4)  # of the text encoder, whose states are stacked


def krea2_transformer(seed: int = 0, **changes: Any) -> Krea2Transformer2DModel:
    """Four blocks. Every norm has a scale that matters; as they are made, all are 1."""
    made = lively(Krea2Transformer2DModel, seed, **{**KREA2, **changes})
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def krea2_inputs(lengths: tuple[int, ...] = (), holes: bool = False, **changes: Any) -> dict[str, Any]:
    """What the pipeline hands to it. lengths: of the prompts; holes: padding stands before the last two tokens, as the pipeline has it."""
    found = call(krea2_transformer, **changes)
    found["timestep"] = found["timestep"] / 1000  # from 0 to 1
    if lengths:
        tokens = torch.arange(found["encoder_hidden_states"].shape[1])
        place = torch.roll(tokens, 2) if holes else tokens
        found["encoder_attention_mask"] = place[None] < torch.tensor(lengths)[:, None]
    return found


def qwen3_encoder(seed: int = 0, width: int = 24) -> Qwen3VLModel:
    """Four layers of text, one of vision."""
    torch.manual_seed(5000 + seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}}
    shape = {"vocab_size": 512, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 4, "max_position_embeddings": 1024}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": width, "deepstack_visual_indexes": [0]}
    return Qwen3VLModel(Qwen3VLConfig(text_config={**heads, **rope, **shape}, vision_config=vision)).eval()


def krea2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Krea 2's own."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400)


def krea2_pipeline(seed: int = 0, text_seed: int = 0, is_distilled: bool = False, **transformer: Any) -> Krea2Pipeline:
    """A whole Krea 2 pipeline."""
    return Krea2Pipeline(
        transformer=krea2_transformer(seed, **transformer),
        text_encoder=qwen3_encoder(text_seed),
        tokenizer=qwen_tokenizer(),
        vae=frame_vae(seed),
        scheduler=krea2_scheduler(),
        text_encoder_select_layers=LAYERS,
        is_distilled=is_distilled,
    )
