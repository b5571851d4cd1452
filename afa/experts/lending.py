"""Experts that are a denoiser alone, and the pipeline that lends them what prompts and pictures need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from afa.errors import UserError
from afa.experts.finite import check_finite
from afa.experts.load import TEXT_ENCODERS, TOKENIZERS, Expert
from afa.experts.locate import Located
from afa.experts.parts import has_part, load_part, read_index
from afa.experts.prediction import predicting
from afa.experts.spec import ExpertSpec


def lend(experts: Sequence[Expert], frame: str | None, dtype: torch.dtype | None) -> Expert | None:
    """Give text encoders, tokenizers and scheduler to experts that came without: -> who lends, None if nobody has to.

    frame: a pipeline's folder; by default the first expert that brings text encoders lends them. Where nobody has any, the experts
    stay bare denoisers. Raises UserError for a frame that is no pipeline's folder, or that nobody needs.
    """
    bare = [expert for expert in experts if not expert.text_encoders]
    if frame is not None and not bare:
        raise UserError(
            f"frame '{frame}' lends to experts that are denoisers alone, and all of these bring their own; leave it out, or choose another VAE with vae (--vae)"
        )
    lender = next((expert for expert in experts if expert.text_encoders), None) if frame is None else load_lender(frame, dtype)
    if lender is None or not bare:
        return None
    for expert in bare:
        expert.lender, expert.text_encoders, expert.tokenizers = lender, list(lender.text_encoders), list(lender.tokenizers)
        expert.scheduler = expert.scheduler or lent_scheduler(expert, lender.scheduler)
        expert.pipeline_options = dict(lender.pipeline_options)
    return lender


def lent_scheduler(expert: Expert, scheduler: Any) -> Any:
    """A lender's scheduler, for what an expert's own file says that it predicts."""
    return None if scheduler is None else predicting(scheduler, expert.said, f"expert '{expert.name}'")


def frame_scheduler(frame: str) -> Any:
    """The scheduler that a pipeline's folder lends. Raises UserError if it is none."""
    return load_part(_pipeline(frame)[0], "scheduler")


def _pipeline(frame: str) -> tuple[Path, dict[str, Any]]:
    folder = Path(frame)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"frame '{frame}' is no pipeline's folder: it has no model_index.json")
    return folder, read_index(folder)


def load_lender(frame: str, dtype: torch.dtype | None) -> Expert:
    """A pipeline's folder without its denoiser. Raises UserError if it is none, or has no text encoders."""
    folder, index = _pipeline(frame)
    found = [part for part in TEXT_ENCODERS if has_part(index, part)]
    if not found:
        raise UserError(f"frame '{frame}' has no text encoders; give the folder of a whole text-to-image pipeline")
    encoders = [load_part(folder, part, dtype or torch.float32) for part in found]
    for part, encoder in zip(found, encoders, strict=True):
        check_finite(encoder, f"the {part} of frame '{frame}'")
    return Expert(
        name=frame,
        model=None,
        text_encoders=encoders,
        tokenizers=[load_part(folder, part) for part in TOKENIZERS if has_part(index, part)],
        scheduler=load_part(folder, "scheduler"),
        pipeline=index["_class_name"],
        located=Located(ExpertSpec(frame, frame), folder),
    )
