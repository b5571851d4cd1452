"""How many steps of one kind of training cost as much as those of another: counted in arithmetic, the same on every machine."""

from typing import Any

import torch
from torch import nn

from afa.aggregators.table import Recipe
from afa.controls.lora import add_lora
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.cost import count_training_flops


def equal_compute_steps(steps: int, denoiser: EnsembleDenoiser, rank: int, batch_size: int) -> int:
    """Steps of a LoRA on one of the experts that cost what `steps` steps of training the ensemble's aggregators cost.

    Forward and backward passes are counted, in floating point operations (see afa.denoiser.cost); what both do once (text
    encoders, VAE, optimiser) is left out.
    """
    side = denoiser.side
    whole = count_training_flops(_on_meta(denoiser), side, side, batch_size)
    single = type(denoiser)([_copy(denoiser.experts[0])], recipe=Recipe("mean"), placement="out")
    with torch.device("meta"):
        add_lora(single.experts[0], rank)
    return round(steps * whole / count_training_flops(single, side, side, batch_size))


def _on_meta(denoiser: EnsembleDenoiser) -> EnsembleDenoiser:
    """The same ensemble without any numbers."""
    experts = [_copy(expert) for expert in denoiser.experts]
    with torch.device("meta"):
        return type(denoiser)(experts, denoiser.names, denoiser.recipe, denoiser.placement)


def _copy(expert: Any) -> nn.Module:
    """A model of an expert's config without any numbers."""
    with torch.device("meta"):
        model: nn.Module = type(expert).from_config(expert.config)
    return model
