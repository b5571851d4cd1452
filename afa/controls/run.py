"""A LoRA from its settings: an expert and data in, a file that diffusers and afa load out, with what it measured."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from safetensors.torch import save_file

from afa import __version__
from afa.checkpoint.manifest import Losses, read_manifest
from afa.claims import FILES
from afa.controls.lora import FILE, add_lora, lora_tensors, matching_rank, parameters_at_rank
from afa.controls.settings import LoraSettings
from afa.devices import choose_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.statistics import difference, estimate
from afa.files import locked, settled, staged
from afa.schema import Count, Within, build
from afa.shareable import public_place
from afa.text_files import read_json
from afa.training.assemble import keep_log, make_accelerator, make_trainer
from afa.training.loop import Progress, Trainer
from afa.training.plan import Plan
from afa.training.prepare import check_objective, find_data, resolution_of
from afa.training.run import LEFT_OUT, check_output
from afa.training.state import check_finished, forget_state, move_state, state_file

RECORD = "finetune.json"


def plan(settings: LoraSettings, alone: Ensemble | None = None) -> tuple[Plan, int]:
    """-> what would be trained, and the rank. Finds everything that would fail later. Raises UserError.

    alone: an ensemble of the one expert, where it is in memory already; its denoiser is changed.
    """
    source = find_data(settings)
    if not (Path(settings.output) / RECORD).exists():
        check_output(settings)
    if settings.device is not None:
        choose_device(settings.device)
    wanted = None if settings.like is None else read_manifest(Path(settings.like)).aggregator["parameters"]
    own = alone is None
    if alone is None:
        dtype = getattr(torch, settings.dtype)
        framed = {"vae": settings.vae, "frame": settings.frame}
        read = {"dtype": dtype, "config": settings.config, "prediction_type": settings.prediction_type}
        alone = Ensemble.from_experts([settings.expert], aggregator="mean", placement="out", **read, **framed)
    check_objective(settings, alone, source)
    rank = settings.rank or matching_rank(alone.denoiser.experts[0], wanted)
    return Plan(settings, alone, source, resolution_of(settings, alone), own), rank


def facts(planned: Plan, rank: int) -> dict[str, Any]:
    """For people and for --json."""
    model = planned.ensemble.denoiser.experts[0]
    held_out = min(planned.settings.held_out, len(planned.source.samples) // 5)
    return {
        "expert": planned.ensemble.names[0],
        "data": planned.source.summary(),
        "training_images": len(planned.source.samples) - held_out,
        "held_out_images": held_out,
        "resolution": planned.resolution,
        "rank": rank,
        "trainable_parameters": parameters_at_rank(model, rank),
        "steps": planned.settings.steps,
        "images_a_step": planned.settings.batch_size * planned.settings.accumulate,
    }


class LoraRecord(TypedDict):
    """What finetune.json says, as far as it is read."""

    settings: dict[str, Any]
    parameters: Count
    steps: Count
    seconds: Annotated[float, Within(0)]
    held_out_loss: Losses


def finished(settings: LoraSettings) -> dict[str, Any] | None:
    """The record of a run that is complete, None if there is none. Raises UserError if it was another run."""
    file = settled(Path(settings.output)) / RECORD
    if not file.exists() or state_file(settings).exists():
        return None
    try:
        record: dict[str, Any] = build(LoraRecord, read_json(file, nan=True), file)
        begun: LoraSettings = build(LoraSettings, record["settings"], file, "settings")
    except UserError as error:
        raise UserError(f"{error}; choose another --output") from None
    if settings.steps != begun.steps:  # its state is gone, so it cannot go on
        raise UserError(f"the LoRA in {settings.output} was finished with --steps {begun.steps} (now {settings.steps}); choose another --output")
    check_finished(settings, begun, record.get("files"), f"the LoRA in {settings.output}")
    forget_state(settings)  # where a run was killed while it removed it
    return record


def finetune(settings: LoraSettings, planned: tuple[Plan, int] | None = None, keep: Path | None = None) -> dict[str, Any]:
    """Train a LoRA, write it into settings.output, and return the record kept beside it.

    keep: where the last state goes, so that a longer run can go on from it (see begin_from); by default it is deleted.

    Data, split, noise, timesteps, dropped captions and measure are those of `afa train` with the same seed. Resumes from a
    saved state; a complete run is only read. Raises UserError, or KeyboardInterrupt with the state saved.
    """
    with contextlib.ExitStack() as stack:
        if finished(settings) is None:
            stack.enter_context(locked(Path(settings.output)))
        return finished(settings) or _finetune(settings, *(planned or plan(settings)), keep)


def _finetune(settings: LoraSettings, work: Plan, rank: int, keep: Path | None) -> dict[str, Any]:
    accelerator = make_accelerator(settings)
    trainer = make_trainer(work, accelerator, lambda alone: add_lora(alone.denoiser.experts[0], rank))
    before = trainer.held_out_losses()
    progress = trainer.train()
    record = _record(settings, trainer, progress, before, rank) | {"left_out": work.source.skipped.counts()}
    if accelerator.is_main_process:
        with staged(Path(settings.output), last=RECORD) as stage:
            metadata = {"format": "pt", "afa": __version__, "expert": public_place(settings.expert), "rank": str(rank)}
            save_file(lora_tensors(work.ensemble.denoiser.experts[0]), stage / FILE, metadata=metadata)
            work.source.skipped.write(stage / LEFT_OUT)
            (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        keep_log(settings)
        if keep is not None:
            move_state(settings, keep)
        forget_state(settings)
    accelerator.wait_for_everyone()
    return record


def _record(settings: LoraSettings, trainer: Trainer, progress: Progress, before: np.ndarray, rank: int) -> dict[str, Any]:
    """Recipe, course and measured result; differences are paired over the held-out images."""
    after = trainer.held_out_losses()
    return {
        "settings": asdict(settings),
        "files": trainer.begun[FILES],
        "afa": __version__,
        "torch": torch.__version__,
        "rank": rank,
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "training_images": len(trainer.data),
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.seconds, 1),
        "held_out_loss": {"trained": asdict(estimate(after)), "expert": asdict(estimate(before))},
        "difference_to_expert": asdict(difference(after, before)),
        "history": progress.history,
    }
