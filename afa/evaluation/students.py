"""Rows of one model that was distilled from the ensemble."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.checkpoint.manifest import read_manifest
from afa.defaults import distill_rate
from afa.distillation.plan import RECORD, plan_distill
from afa.distillation.run import distill, distill_finished
from afa.distillation.settings import DistillSettings
from afa.errors import UserError
from afa.evaluation.controls import weighted_merge
from afa.evaluation.rows import GUIDED, STUDENTS, MethodRow, Options, Trained
from afa.evaluation.setup import Setup
from afa.evaluation.trained import afa_run
from afa.evaluation.untrained import merged_sampler
from afa.experts.load import load_expert
from afa.sampling.sample import Request, Sampler, Sampling
from afa.seeds import nth_seed
from afa.training.finetune import FILE, fuse_lora, matching_rank

RATES = (1.0, 10.0)  # of the default learning rate: the one that comes nearer to the ensemble is taken
PER_STEP = 2  # steps of a distillation for one of the ensemble's, where their number is not given


def student_rows(setup: Setup) -> list[MethodRow]:
    """Return the rows of the students; training run k has the ensemble of run k as its teacher."""
    rows = []
    for name, title in STUDENTS.items():
        sampler = functools.partial(_sampler, setup, name)
        train = functools.partial(_train, setup, name)
        given: dict[str, Any] = {"group": "ours", "train": train, "runs": setup.settings.seeds}
        given |= {"candidates": tuple({"lr": rate} for rate in RATES), "by_loss": True}
        rows.append(MethodRow(name, title=title, sampler=sampler, note="lr: times the default", **given))
    return rows


def _settings(setup: Setup, name: str, options: Options, teacher: Path, run: int) -> DistillSettings:
    denoiser, sampling = setup.ensemble.denoiser, setup.sampling
    built_in = denoiser.interface.default_cfg_scale(denoiser.config) <= 1
    guidance = (sampling.true_guidance if built_in else sampling.guidance) or 1.0
    if name == GUIDED and (built_in or guidance <= 1):
        raise UserError("it learns guidance of two passes, and the images are drawn without")
    steps = setup.settings.distill_steps or PER_STEP * setup.recorded["steps"]
    rank = None
    if name == "distilled_lora":
        parameters = read_manifest(setup.folder).aggregator["parameters"]
        rank = matching_rank(setup.ensemble.experts[0].model, parameters)
    strengths: dict[str, Any] = {"guidance_in": guidance} if name == GUIDED else {"guidance": guidance}
    return DistillSettings(
        ensemble=str(teacher),
        data=setup.training_data,
        output=str(setup.output / "trained" / name / f"lr-{options['lr']:g}" / f"seed-{run}"),
        lr=options["lr"] * distill_rate(max(stage.channels for stage in denoiser.stages)),
        steps=steps,
        lora=rank,
        resolution=setup.recorded.get("resolution"),
        allow_outside=setup.settings.allow_outside,
        seed=nth_seed(setup.recorded.get("seed", 0), run),
        device=setup.settings.device,
        dtype="bfloat16" if setup.settings.dtype == "bfloat16" else "float32",
        **strengths,
    )


def _train(setup: Setup, name: str, options: Options, run: int) -> Trained:
    """Distil, or read what was distilled before."""
    teacher = afa_run(setup, options, run).folder
    settings = _settings(setup, name, options, teacher, run)
    record = distill_finished(settings)
    if record is None:
        ensemble = setup.ensemble.sharing(aggregators=teacher)
        ensemble.aggregators.to(setup.dtype)
        record = distill(settings, plan_distill(settings, ensemble))
    loss, folder = record["held_out_loss"]["trained"]["value"], Path(settings.output)
    note = "loss: squared distance to the ensemble's predictions"
    file = folder / (RECORD if settings.lora is None else FILE)  # whole weights may lie in several files
    return Trained(folder, file, record["parameters"], record["steps"], record["seconds"], loss, note)


def _sampler(setup: Setup, name: str, options: Options, run: int) -> Sampler:
    """Return a stock pipeline around the student."""
    trained = _train(setup, name, options, run)
    if trained.file.name == FILE:
        student = weighted_merge(setup)
        fuse_lora(student.model, trained.file)
    else:
        student = load_expert(str(trained.folder), setup.dtype)
    drawn = merged_sampler(setup, student)
    if name != GUIDED:
        return drawn

    def unguided(requests: Sequence[Request], sampling: Sampling) -> NDArray[np.uint8]:
        return drawn(requests, replace(sampling, guidance=1.0))

    return unguided
