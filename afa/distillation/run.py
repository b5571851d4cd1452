"""A run of distillation: an ensemble and captions in; one model that predicts as the ensemble does out."""

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from afa.checkpoint.manifest import Losses
from afa.distillation.plan import RECORD, DistillPlan, plan_distill, trained_part
from afa.distillation.settings import DistillSettings
from afa.distillation.student import write_student
from afa.errors import UserError
from afa.files import locked, settled, staged
from afa.places import public_place
from afa.schema import Count, build
from afa.stats import difference
from afa.text_files import read_json
from afa.training.record import check_record, run_record
from afa.training.setup import end_run, make_accelerator, make_trainer
from afa.training.state import state_file


class DistillRecord(TypedDict):
    """The fields of distill.json that are read again."""

    settings: dict[str, Any]
    parameters: Count
    steps: Count
    seconds: float
    held_out_loss: Losses


def distill_finished(settings: DistillSettings) -> dict[str, Any] | None:
    """Return the record of a complete run; None if there is none. Raises UserError if it was another run."""
    file = settled(settings.folder) / RECORD
    if not file.exists() or state_file(settings).exists():
        return None
    try:
        record: dict[str, Any] = build(DistillRecord, read_json(file, nan=True), file)
        begun: DistillSettings = build(DistillSettings, record["settings"], file, "settings")
    except UserError as error:
        raise UserError(f"{error}; choose another --output") from None
    if settings.lr is None:
        settings = replace(settings, lr=begun.lr)
    check_record(settings, begun, record, f"the student in {settings.output}")
    if settings.single_file and not Path(settings.output).is_file():
        raise UserError(
            f"{file} says that {settings.output} is finished, and it is gone; delete {file} to distil again"
        )
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
