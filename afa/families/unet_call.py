"""How Stable Diffusion 1.x, 2.x and XL U-Nets are called."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.families.call import Call

XL = 5.0  # the strength of guidance of SDXL's pipeline
TIMES = 6  # of SDXL's micro-conditioning: original size, crop, target size, two numbers each


class UNetCall(Call):
    """Latents as they are; text states, and for SDXL pooled states and sizes."""

    tokens = 77  # of CLIP
    patch = 1
    encoded = (0, 2)
    joined = True
    streams = False
    frozen_text = False
    alike = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim", "time_cond_proj_dim")
    guidance = 7.5

    def pipeline(self, text_encoders: int) -> str:
        return "StableDiffusionXLPipeline" if text_encoders == 2 else "StableDiffusionPipeline"

    def prompt_tokens(self, encoders: Sequence[Any]) -> int:
        return getattr(encoders[0], "max_position_embeddings", self.tokens) if encoders else self.tokens

    def side(self, config: Any) -> Any:
        return config.sample_size

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        if len(parts) == 1:
            return {"encoder_hidden_states": parts[0]}
        return {"encoder_hidden_states": parts[0], "added_cond_kwargs": {"text_embeds": parts[1], "time_ids": sizes}}

    def blank(self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
        text = config.encoder_hid_dim or config.cross_attention_dim
        parts = [empty(batch, tokens, text if isinstance(text, int) else text[0])]
        if config.addition_embed_type == "text_time":
            parts.append(empty(batch, config.projection_class_embeddings_input_dim - TIMES * config.addition_time_embed_dim))
        found = self.conditions(config, parts, empty(batch, TIMES))
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            found["class_labels"] = _labels(config, batch, empty)
        return found

    def arguments(self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        return {"sample": noisy, "timestep": times, **conditions}

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        return call["sample"]

    def strength(self, config: Any) -> float | None:
        return XL if config.addition_embed_type == "text_time" else self.guidance

    def guided(self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None) -> dict[str, Any]:
        if negative is not None and self.unpaired(config):
            raise UserError(f"a negative prompt needs classifier-free guidance, and {self.unpaired(config)}; leave it out")
        return super().guided(config, count, strength, negative, true)

    def unpaired(self, config: Any) -> str:
        return "" if config.time_cond_proj_dim is None else "these experts have theirs built in (time_cond_proj_dim)"


def _labels(config: Any, batch: int, empty: Callable[..., Tensor]) -> Tensor:
    """Class labels as a U-Net's kind of class embedding takes them."""
    if config.class_embed_type in ("projection", "simple_projection"):
        return empty(batch, config.projection_class_embeddings_input_dim)
    if config.class_embed_type == "identity":
        return empty(batch, 4 * config.block_out_channels[0])
    return torch.zeros(batch, dtype=torch.long, device=empty().device)
