"""From latents to images with gradients: what rewards look at."""

from typing import Any

import torch
from torch import Tensor


class Decoder:
    """A frozen VAE's decoder. Images come out as it makes them, about [-1, 1] but not cut there, so that gradients live."""

    def __init__(self, vae: Any, scale: float, shift: float, checkpointing: bool = False) -> None:
        self.vae, self.scale, self.shift = vae.requires_grad_(False), scale, shift
        if checkpointing:
            vae.enable_gradient_checkpointing()
            vae.train()  # only then it checkpoints; it has neither dropout nor batch statistics

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) in the denoiser's units -> (B, 3, H, W) float32."""
        dtype = next(self.vae.parameters()).dtype
        images: Tensor = self.vae.decode((latents / self.scale + self.shift).to(dtype), return_dict=False)[0]
        return images.to(torch.float32)
