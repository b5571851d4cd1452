"""A stock pipeline as a sampler, made where the experts are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.load import Expert
from afa.families.table import FAMILIES
from afa.generation.sample import OnStep, Request, Sampling, sample, strength
from afa.lookup import unknown


@dataclass(frozen=True)
class PipelineSampler:
    """Images from a stock pipeline. guided: parts of it that have to know how strong the guidance is."""

    pipeline: Any
    guided: tuple[Any, ...] = ()

    @property
    def denoiser(self) -> Any:
        """What stands in the denoiser's place; weight maps are recorded there."""
        return next(part for family in FAMILIES.values() if (part := self.pipeline.components.get(family.component)) is not None)

    def __call__(self, requests: Sequence[Request], sampling: Sampling, on_step: OnStep | None = None) -> NDArray[np.uint8]:
        """-> (n, H, W, 3) uint8."""
        for part in self.guided:
            part.guidance = strength(self.pipeline, sampling)
        return sample(self.pipeline, requests, sampling, on_step)


def in_frame(ensemble: Ensemble, denoiser: nn.Module, **components: Any) -> Any:
    """A stock pipeline of the ensemble's frame with another denoiser, on the experts' device."""
    components[FAMILIES[ensemble.experts[0].family].component] = denoiser
    return settled(ensemble.pipeline(**components), ensemble.experts[0])


def settled(pipeline: Any, expert: Expert) -> Any:
    """The pipeline on an expert's device, without a bar of its own."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(next(expert.model.parameters()).device)


def check_guidable(ensemble: Ensemble, method: str) -> None:
    """Raises UserError for experts whose pipelines make no unconditional prediction beside the conditional one."""
    reason = ensemble.denoiser.call.unpaired(ensemble.denoiser.config)
    if reason:
        raise UserError(f"{method} needs classifier-free guidance, and {reason}; choose another method")


def find_expert(ensemble: Ensemble, name: str | None) -> int:
    """The place of an expert; None: of the only one. Raises UserError."""
    if name is None and len(ensemble.names) > 1:
        raise UserError(f"which expert? give expert=NAME (or --expert NAME), one of {', '.join(ensemble.names)}")
    if name is not None and name not in ensemble.names:
        raise UserError(unknown(name, ensemble.names, "expert"))
    return 0 if name is None else ensemble.names.index(name)
