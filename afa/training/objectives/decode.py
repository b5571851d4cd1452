"""From latents to images with gradients: what rewards look at."""

from typing import Any

import torch
from torch import Tensor

from afa.latents import latents_of


class Decoder:
    """A frozen VAE's decoder. Images come out as it makes them, about [-1, 1] but not cut there, so that gradients live."""

    def __init__(self, vae: Any, checkpointing: bool = False) -> None:
        self.vae, self.latents = vae.requires_grad_(False), latents_of(vae)
        if checkpointing:
            self.latents.recompute(vae)

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) in the denoiser's units -> (B, 3, H, W) float32."""
        dtype = next(self.vae.parameters()).dtype
        return self.latents.draw(self.vae, self.latents.unscaled(latents).to(dtype)).to(torch.float32)
