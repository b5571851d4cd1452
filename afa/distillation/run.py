"""A run of distillation: an ensemble and captions in; one model that predicts as the ensemble does out."""

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from afa.distillation.plan import RECORD, DistillPlan, plan_distill, trained_part
from afa.distillation.settings import DistillSettings
from afa.distillation.student import write_student
from afa.files import locked, staged
from afa.places import public_place
from afa.stats import difference
from afa.training.record import check_record, check_there, finished_record, run_record
from afa.training.setup import end_run, make_accelerator, make_trainer


def distill_finished(settings: DistillSettings) -> dict[str, Any] | None:
    """Return the record of a complete run; None if there is none. Raises UserError if it was another run."""
    found = finished_record(settings, RECORD)
    if found is None:
        return None
    record, begun = found
    if settings.lr is None:
        settings = replace(settings, lr=begun.lr)
    check_record(settings, begun, record, f"the student in {settings.output}")
    check_there(settings, RECORD, "distil")
    return record


def distill(settings: DistillSettings, planned: DistillPlan | None = None) -> dict[str, Any]:
    """Train a student on the answers of an ensemble, and write it to settings.output.

    planned: what plan_distill(settings) returned, if the models are in memory already
    A run resumes from its saved state; a complete run is only read.
    Returns the record that is kept in distill.json.
    Raises UserError, and KeyboardInterrupt after the state is saved.
    """
    with contextlib.ExitStack() as stack:
        if distill_finished(settings) is None:
            stack.enter_context(locked(settings.folder))
            if settings.single_file:
                stack.enter_context(locked(Path(settings.output), file=True))
        return distill_finished(settings) or _distill(planned or plan_distill(settings))


def _distill(planned: DistillPlan) -> dict[str, Any]:
    settings: Any = planned.settings
    accelerator = make_accelerator(settings)
    trainer = make_trainer(
        planned, accelerator, lambda student: trained_part(settings.lora, student.denoiser.experts[0])
    )
    autocast = getattr(torch, settings.dtype) if settings.dtype != "float32" else None
    with torch.autocast(accelerator.device.type, autocast) if autocast else contextlib.nullcontext():
        progress = trainer.train()
        after = trainer.held_out_losses()
    assert trainer.before is not None
    before = trainer.before.losses
    facts = {
        "teacher": public_place(settings.ensemble),
        "method": settings.method,
        "student": public_place(settings.student),
        "steps": progress.best_step,
        "guidance_in": settings.guidance_in,
    }
    record = {
        **run_record(trainer, progress, {"trained": after, "student": before}),
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "difference_to_student": asdict(difference(after, before)),  # paired over the held-out captions
    }
    if accelerator.is_main_process:
        with staged(settings.folder, last=RECORD) as stage:
            write_student(settings, planned.ensemble, stage, facts)
            (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    end_run(settings, accelerator)
    return record
