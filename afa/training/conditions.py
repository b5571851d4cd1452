"""Captions as the denoiser takes them: through the pipeline's own encode_prompt, with captions dropped sample by sample."""

from typing import Any

import torch
from torch import Tensor


class Conditions:
    """Encodes captions with the ensemble's stock pipeline.

    A dropped caption is what guidance uses for "no prompt": the empty caption, or zeros where the pipeline is
    configured so (SDXL's force_zeros_for_empty_prompt).
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.pooled = hasattr(pipeline, "text_encoder_2")
        self._none = self._encode([""])
        if self.pooled and pipeline.config.get("force_zeros_for_empty_prompt"):
            self._none = tuple(torch.zeros_like(part) for part in self._none)

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> tuple[Tensor, ...]:
        """States (B, T, D) and, for SDXL, pooled states (B, P)."""
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        encoded = self.pipeline.encode_prompt(captions, **options)
        return (encoded[0], encoded[2]) if self.pooled else (encoded[0],)

    def __call__(self, captions: list[str], sizes: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Keyword arguments of the denoiser. sizes (B, 6) for SDXL; dropped (B,) bool: samples without their caption."""
        parts = []
        for part, none in zip(self._encode(captions), self._none, strict=True):
            mask = dropped.to(part.device).view(-1, *[1] * (part.ndim - 1))
            parts.append(torch.where(mask, none, part))
        arguments: dict[str, Any] = {"encoder_hidden_states": parts[0]}
        if self.pooled:
            arguments["added_cond_kwargs"] = {"text_embeds": parts[1], "time_ids": sizes.to(self.device, parts[1].dtype)}
        return arguments
