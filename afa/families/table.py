"""The table of families: which diffusers models can be read as stages, and how."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from afa.families import unet
from afa.families.stage import Stage


@dataclass(frozen=True)
class Family:
    """model: the diffusers class it reads. component: its name in a pipeline. stages: the reading itself."""

    model: str
    component: str
    stages: Callable[[nn.Module], tuple[Stage, ...]]


FAMILIES: dict[str, Family] = {
    "unet": Family(model="UNet2DConditionModel", component="unet", stages=unet.stages),
}


def family_of(model: nn.Module) -> str:
    """The name of the family that reads this model. Raises ValueError if none does."""
    kind = type(model).__name__
    for name, family in FAMILIES.items():
        if family.model == kind:
            return name
    known = ", ".join(family.model for family in FAMILIES.values())
    raise ValueError(f"a {kind} cannot be an expert; supported are: {known}")
