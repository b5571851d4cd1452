"""Weight maps of a sampling in ComfyUI, found by the latents that it made, and drawn."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.comfyui.running import KEPT, RunningEnsemble
from afa.errors import UserError, unknown
from afa.pictures import COLOURS, heat, mean_over_stages, overlay

PIXELS = 8  # a side of one latent pixel, where no picture is given


def means_of(ensemble: RunningEnsemble, samples: Tensor, stage: str, everywhere: str) -> Tensor:
    """Return the mean weights of the sampling that made some latents, (B, N, H, W).

    stage:      one of them, or `everywhere`: the mean over all, in the size of the latents
    Raises UserError if none of the last samplings made them, and for an unknown stage.
    """
    for latents, means in ensemble.results[::-1]:
        if latents.shape == samples.shape and torch.equal(latents, samples.to(latents)):
            if not means:
                raise UserError("no step of this sampling covered the whole picture with a positive prompt")
            if stage == everywhere:
                return mean_over_stages(means, (samples.shape[-2], samples.shape[-1]))
            if stage not in means:
                raise UserError(unknown(stage, [everywhere, *means], "stage with weights"))
            return means[stage]
    raise UserError(
        f"these latents are of none of the last {KEPT} samplings of this MODEL; "
        "connect the MODEL that the sampler had, and the LATENT that came from it"
    )


def drawn(weights: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw weights: a picture of each expert (B·N, H, W, 3), and all over the image (B, H, W, 3), 0 to 1.

    weights: (B, N, h, w)
    image:   (B or 1, H, W, 3); None: a grey one
    """
    batch, _, height, width = weights.shape
    if image is None:
        image = torch.full((1, height * PIXELS, width * PIXELS, 3), 0.5)
    if len(image) not in (1, batch):
        raise UserError(
            f"{len(image)} pictures for the weights of {batch}; connect the pictures of these latents"
        )
    size = (image.shape[1], image.shape[2])
    large = torch.nn.functional.interpolate(weights, size=size, mode="bilinear", align_corners=False).numpy()
    pictures = (image.expand(batch, -1, -1, -1).cpu() * 255).round().to(torch.uint8).numpy()
    maps = [heat(one, COLOURS[place % len(COLOURS)]) for own in large for place, one in enumerate(own)]
    over = [overlay(picture, own) for picture, own in zip(pictures, large, strict=True)]
    return _images(maps), _images(over)


def _images(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Return pictures (H, W, 3) as ComfyUI's IMAGE, (B, H, W, 3) from 0 to 1."""
    return torch.from_numpy(np.stack(pictures)).float() / 255
