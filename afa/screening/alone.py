"""One expert in memory at a time, each in the frame of the first: its VAE's latents, its scheduler's noise."""

import gc
from dataclasses import dataclass
from typing import Any

import torch

from afa.aggregators.table import Recipe
from afa.denoiser.conversion import conversion
from afa.denoiser.schedule import Schedule
from afa.denoiser.table import DENOISERS
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.lending import lend, load_lender
from afa.experts.load import Expert, load_experts, load_vae
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.frame import Frame
from afa.text import width_of
from afa.training.conditions import Conditions


@dataclass(frozen=True)
class Common:
    """What all experts are asked in: the first one's VAE and scheduler. lender: a folder whose text encoders bare denoisers borrow."""

    vae: Any
    scheduler: Any
    lender: str | None
    config: str | None
    dtype: torch.dtype
    device: torch.device

    def load(self, spec: ExpertSpec) -> Ensemble:
        """An expert by itself, its predictions turned into the frame's kind where they are of another."""
        expert = load_alone(spec, self.lender, self.dtype, self.config)
        kind = conversion(Schedule.of(expert.scheduler), Schedule.of(self.scheduler))
        widths = [width_of(encoder) for encoder in expert.text_encoders]
        maker = DENOISERS[expert.family]
        try:
            denoiser = maker([expert.model], [expert.name], Recipe("mean"), "out", widths, [kind])
        except ValueError as error:
            raise UserError(str(error)) from None
        return Ensemble([expert], denoiser, Frame([expert], lender=expert.lender)).to(self.device)

    def conditions(self, ensemble: Ensemble) -> Conditions:
        """Its own text encoders."""
        return Conditions(ensemble.pipeline(vae=self.vae), ensemble.denoiser, self.device)


def common(
    first: Expert, lender: str | None, vae: str | None, config: str | None, dtype: torch.dtype, device: torch.device
) -> Common:  # fmt: skip
    """first: an expert without its weights (see outline.py). vae: instead of its own. Raises UserError if VAE or scheduler is nowhere to be had."""
    borrowed = None if first.scheduler is not None else load_lender(_folder(first, lender), dtype)
    scheduler = first.scheduler if borrowed is None else borrowed.scheduler
    if vae is not None:
        return Common(load_vae(locate(ExpertSpec("vae", vae)), config, dtype, like=first), scheduler, lender, config, dtype, device)
    own = first.located if first.located is not None and first.located.whole_pipeline else None
    found = load_vae(own, first.config or config, dtype) if own is not None else (borrowed or load_lender(_folder(first, lender), dtype)).load_vae()
    return Common(found, scheduler, lender, config, dtype, device)


def _folder(expert: Expert, frame: str | None) -> str:
    if frame is None:
        raise UserError(f"expert '{expert.name}' lacks a VAE, text encoders or a scheduler; name a pipeline's folder that lends them: --frame FOLDER")
    return frame


def load_alone(spec: ExpertSpec, lender: str | None, dtype: torch.dtype, config: str | None) -> Expert:
    """One expert. Raises UserError for a denoiser alone that nobody lends text encoders and scheduler to."""
    (expert,) = load_experts([spec], dtype, config)
    if not expert.text_encoders:
        lend([expert], _folder(expert, lender), dtype)
    return expert


def forget() -> None:
    """Give back the memory of an expert that is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
