"""The table of families: which diffusers models can be read as stages, and how each is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from afa.families import flux, qwen_image, sd3, unet
from afa.families.call import Call
from afa.families.stage import Stage
from afa.families.unet_call import UNetCall


@dataclass(frozen=True)
class Family:
    """model: the diffusers class it reads. component: its name in a pipeline. stages: the reading itself. call: how it is called.

    placement: where aggregators stand if nobody says; why: docs/families.md.
    """

    model: str
    component: str
    stages: Callable[[Any], tuple[Stage, ...]]
    call: Call
    placement: str = "layers"


FAMILIES: dict[str, Family] = {
    "unet": Family("UNet2DConditionModel", "unet", unet.stages, UNetCall()),
    "sd3": Family("SD3Transformer2DModel", "transformer", sd3.stages, sd3.SD3Call()),
    "flux": Family("FluxTransformer2DModel", "transformer", flux.stages, flux.FluxCall(), placement="every-4"),
    # 60 blocks 3072 wide: aggregators of three experts have 247 million parameters at all stages, 64 at every fourth, as FLUX.1's and SD3's
    "qwen-image": Family("QwenImageTransformer2DModel", "transformer", qwen_image.stages, qwen_image.QwenImageCall(), placement="every-4"),
}


def called(pipeline: Any) -> tuple[Call, Any]:
    """How a pipeline's denoiser is called, be it a model or a drop-in, and its config. Raises ValueError if there is none."""
    for family in FAMILIES.values():
        denoiser = pipeline.components.get(family.component)
        if denoiser is not None:
            return FAMILIES[getattr(denoiser, "family", None) or family_of(denoiser)].call, denoiser.config
    raise ValueError(f"a {type(pipeline).__name__} has no denoiser of a known family")


def family_of(model: nn.Module) -> str:
    """The name of the family that reads this model. Raises ValueError if none does."""
    kind = type(model).__name__
    for name, family in FAMILIES.items():
        if family.model == kind:
            return name
    known = ", ".join(family.model for family in FAMILIES.values())
    raise ValueError(f"a {kind} cannot be an expert; supported are: {known}")
