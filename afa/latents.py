"""The latents of a VAE: how it encodes images, scales latents for the denoiser, and decodes them."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from afa.errors import UserError


class Latents:
    """The latents of an `AutoencoderKL` (SD, SDXL, SD3, FLUX.1). Denoisers take them as (x - shift) · scale.

    channels:     C
    factor:       pixels per latent, on each side
    scale, shift: numbers, or (C, 1, 1) if the config has a mean and a deviation for every channel
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.channels: int = config["latent_channels"]
        self.factor: int = 2 ** (len(config["block_out_channels"]) - 1)
        self._scaled_by(config)

    @classmethod
    def of(cls, vae: Any) -> "Latents":
        """Return the latents of a VAE."""
        return cls(vae.config)

    def _scaled_by(self, config: Mapping[str, Any]) -> None:
        self.scale: float | Tensor = config.get("scaling_factor", 1.0)
        self.shift: float | Tensor = config.get("shift_factor") or 0.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self.scale = self.scale / torch.tensor(config["latents_std"]).view(-1, 1, 1)
            self.shift = torch.tensor(config["latents_mean"]).view(-1, 1, 1)

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale a VAE's latents (…, C, h, w) for the denoiser."""
        return (latents - _beside(self.shift, latents)) * _beside(self.scale, latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Undo `scaled`."""
        return latents / _beside(self.scale, latents) + _beside(self.shift, latents)

    def moments(self, vae: Any, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) from -1 to 1: -> unscaled means and log-variances (B, 2C, h, w)."""
        moments: Tensor = vae.encode(images).latent_dist.parameters
        return moments

    def draw(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w): -> images (B, 3, H, W), about -1 to 1 but not clamped."""
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return images

    def recompute(self, vae: Any) -> None:
        """From now on, recompute blocks of the decoder in the backward pass; this saves memory."""
        vae.enable_gradient_checkpointing()
        vae.train()  # diffusers checkpoints in this mode only; a VAE has neither dropout nor batch statistics


class FrameLatents(Latents):
    """The latents of an `AutoencoderKLQwenImage`, which treats an image as a video of one frame."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.channels = config["z_dim"]
        self.factor = 2 ** len(config["temperal_downsample"])
        self.recomputes = False
        self._scaled_by(config)

    def moments(self, vae: Any, images: Tensor) -> Tensor:
        return super().moments(vae, images[:, :, None])[:, :, 0]

    def draw(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode like Latents.draw, but without decode(), which clamps and so stops gradients."""
        decoder, hidden = vae.decoder, vae.decoder.conv_in(vae.post_quant_conv(latents[:, :, None]))
        for block in (decoder.mid_block, *decoder.up_blocks):
            hidden = self._run(block, hidden)
        images: Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden)))
        return images[:, :, 0]

    def _run(self, block: Any, hidden: Tensor) -> Tensor:
        if not (self.recomputes and torch.is_grad_enabled()):
            return block(hidden)
        return torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)

    def recompute(self, vae: Any) -> None:
        self.recomputes = True  # the VAE has no switch of its own


class TransparentLatents(FrameLatents):
    """The latents of an `AutoencoderKLQwenImage21`: images with transparency, as videos of one frame.

    Raises UserError for a VAE that folds patches of pixels into channels.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if config.get("patch_size") is not None:
            raise UserError(
                f"a VAE with patch_size {config['patch_size']} is not supported; choose another with vae="
            )

    def moments(self, vae: Any, images: Tensor) -> Tensor:
        """Encode opaque images (B, 3, H, W); see Latents.moments."""
        return super().moments(vae, torch.cat([images, torch.ones_like(images[:, :1])], dim=1))

    def draw(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode like FrameLatents.draw, and lay what is transparent over white."""
        images = super().draw(vae, latents)
        opacity = (images[:, 3:] / 2 + 0.5).clamp(0, 1)
        return images[:, :3] * opacity + (1 - opacity)

    def _run(self, block: Any, hidden: Tensor) -> Tensor:
        # as the first frame of a video, which is repeated where later ones would be made
        middle = hasattr(block, "attentions")
        return super()._run(block if middle else functools.partial(block, first_chunk=True), hidden)


class PatchedLatents(Latents):
    """The latents of an `AutoencoderKLFlux2`.

    They are scaled by the mean and the deviation of every channel of patches of 2×2 latents, which are not in
    the config but among the VAE's weights: the statistics of a batch norm that is never run.
    scale, shift: (4C, 1, 1); they act on latents (…, C, h, w) whose patches became channels (…, 4C, h/2, w/2)
    """

    @classmethod
    def of(cls, vae: Any) -> "PatchedLatents":
        made = cls(vae.config)
        made.shift = vae.bn.running_mean.view(-1, 1, 1)
        made.deviation = torch.sqrt(vae.bn.running_var.view(-1, 1, 1) + vae.config.batch_norm_eps)
        made.scale = 1 / made.deviation
        return made

    def scaled(self, latents: Tensor) -> Tensor:
        patches = pixel_unshuffle(latents, 2)
        return pixel_shuffle((patches - _beside(self.shift, patches)) / _beside(self.deviation, patches), 2)

    def unscaled(self, latents: Tensor) -> Tensor:
        patches = pixel_unshuffle(latents, 2)
        return pixel_shuffle(patches * _beside(self.deviation, patches) + _beside(self.shift, patches), 2)


LATENTS: dict[str, type[Latents]] = {
    "AutoencoderKL": Latents,
    "AutoencoderKLQwenImage": FrameLatents,
    "AutoencoderKLQwenImage21": TransparentLatents,
    "AutoencoderKLFlux2": PatchedLatents,
}


def latents_of(vae: Any) -> Latents:
    """Return the latents of a VAE. Raises UserError for a VAE of an unknown class."""
    kind = type(vae).__name__
    if kind not in LATENTS:
        raise UserError(
            f"latents of a {kind} are not known here; known VAEs are {', '.join(LATENTS)}: "
            "choose another with vae="
        )
    return LATENTS[kind].of(vae)


def _beside(factor: float | Tensor, latents: Tensor) -> float | Tensor:
    """Move a factor to the device and dtype of the latents."""
    return factor.to(latents) if isinstance(factor, Tensor) else factor
