"""The registry of families: how a model is recognised, read and replaced."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from afa.denoiser.base import EnsembleDenoiser
from afa.models.chroma import ChromaEnsemble
from afa.models.flux import FluxEnsemble
from afa.models.flux2 import Flux2Ensemble
from afa.models.krea2 import Krea2Ensemble
from afa.models.lumina2 import Lumina2Ensemble
from afa.models.qwen_image import QwenImageEnsemble
from afa.models.qwen_image_21 import QwenImage21Ensemble
from afa.models.sd3 import SD3Ensemble
from afa.models.unet import UNetEnsemble
from afa.models.z_image import ZImageEnsemble
from afa.stages.interface import ModelInterface
from afa.stages.original_names import Layers, original_layers
from afa.stages.stage import Stage, stage_of_names


@dataclass(frozen=True)
class Family:
    """How models of one class are recognised, read and replaced.

    model:     name of the diffusers class
    component: name of the denoiser in a pipeline
    denoiser:  class that replaces N such models; it also defines how one model is read and called
    """

    model: str
    component: str
    denoiser: type[EnsembleDenoiser]

    @property
    def stages(self) -> Callable[[Any], tuple[Stage, ...]]:
        """The function that reads a model as stages."""
        return self.denoiser.read_stages

    @property
    def interface(self) -> ModelInterface:
        """How the denoiser is called."""
        return self.denoiser.interface

    @property
    def placement(self) -> str:
        """The default placement; docs/families.md says why."""
        return self.denoiser.default_placement


FAMILIES = {
    "unet": Family("UNet2DConditionModel", "unet", UNetEnsemble),
    "sd3": Family("SD3Transformer2DModel", "transformer", SD3Ensemble),
    "flux": Family("FluxTransformer2DModel", "transformer", FluxEnsemble),
    "flux2": Family("Flux2Transformer2DModel", "transformer", Flux2Ensemble),
    "qwen-image": Family("QwenImageTransformer2DModel", "transformer", QwenImageEnsemble),
    "z-image": Family("ZImageTransformer2DModel", "transformer", ZImageEnsemble),
    "chroma": Family("ChromaTransformer2DModel", "transformer", ChromaEnsemble),
    "qwen-image-2.1": Family("QwenImage21Transformer2DModel", "transformer", QwenImage21Ensemble),
    "krea2": Family("Krea2Transformer2DModel", "transformer", Krea2Ensemble),
    "lumina2": Family("Lumina2Transformer2DModel", "transformer", Lumina2Ensemble),
}


def interface_of(pipeline: Any) -> tuple[ModelInterface, Any]:
    """Return the interface and the config of a pipeline's denoiser, which is a model or an ensemble.

    The config has the settings of the pipeline that say how the denoiser is used.

    Raises ValueError if the pipeline has no denoiser of a known family.
    """
    denoiser = denoiser_of(pipeline)
    interface = FAMILIES[getattr(denoiser, "family", None) or family_of(denoiser)].interface
    return interface, interface.with_settings(denoiser.config, pipeline.config)


def denoiser_of(pipeline: Any) -> Any:
    """Return a pipeline's denoiser. Raises ValueError if it has none of a known family."""
    for family in FAMILIES.values():
        denoiser = pipeline.components.get(family.component)
        if denoiser is not None:
            return denoiser
    raise ValueError(f"a {type(pipeline).__name__} has no denoiser of a known family")


def family_of(model: nn.Module) -> str:
    """Return the name of the family that reads this model. Raises ValueError if there is none."""
    kind = type(model).__name__
    for name, family in FAMILIES.items():
        if family.model == kind:
            return name
    known = ", ".join(family.model for family in FAMILIES.values())
    raise ValueError(f"a {kind} cannot be an expert; supported are: {known}")


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a denoiser's stages, in order. Raises ValueError if no family reads it."""
    return tuple(stage.name for stage in FAMILIES[family_of(model)].stages(model))


def stages_of(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Map every parameter and buffer of a denoiser to the name of its stage (see stage_of_names).

    names: the model's own, or those that a file holds for it
    Raises ValueError if no family reads the model.
    """
    return stage_of_names(names, model, FAMILIES[family_of(model)].stages(model))


def layers_of(model: nn.Module) -> dict[str, Layers]:
    """Return the original names of a denoiser's layers (see original_layers).

    Raises ValueError if no family reads the model.
    """
    family = family_of(model)
    return original_layers(model, family, FAMILIES[family].stages(model))
