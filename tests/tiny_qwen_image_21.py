"""Factories of a tiny Qwen-Image 2.1, of the real classes, and of its whole pipeline."""

from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from tiny_transformers import call, lively

QWEN_IMAGE_21 = {
    "in_channels": 6,
    "out_channels": 6,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 24,
    "mlp_ratio": 2,
    "axes_dims_rope": (4, 6, 6),
}
QWEN_IMAGE_21_SMALL = {"num_layers": 2}  # Q00, Q01, OUT


def qwen_image_21_transformer(seed: int = 0, **changes: Any) -> QwenImage21Transformer2DModel:
    """Four blocks."""
    return lively(QwenImage21Transformer2DModel, seed, **{**QWEN_IMAGE_21, **changes})


def qwen_image_21_inputs(lengths: tuple[int, ...] = (), height: int = 8, width: int = 8, **changes: Any) -> dict[str, Any]:
    """What the pipeline hands over. lengths: of the prompts, where they are padded to the longest."""
    found = call(qwen_image_21_transformer, height=height, width=width, **changes)
    if lengths:
        found["encoder_hidden_states_mask"] = torch.arange(found["encoder_hidden_states"].shape[1])[None] < torch.tensor(lengths)[:, None]
    return found
