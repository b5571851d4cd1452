"""Make a trainer from a plan: processes, data, objective, conditions, sample sheets."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.prompts import warn_of_prompts
from afa.seeds import narrow
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.log import LOG, flat
from afa.training.loop import Trainer
from afa.training.noise import Batch, Noising
from afa.training.objective_terms import make_context, make_objectives
from afa.training.plan import TrainingPlan
from afa.training.prepare import encode_captions, encode_data
from afa.training.settings import LoopSettings
from afa.training.sheets import Sheets, make_watch
from afa.training.state import belongings, forget_state, state_file
from afa.training.teacher import Distillation, Teacher, own_samplings, teaching_method
from afa.training.trajectories import Trajectories

RUNS = "runs"  # the folder of what trackers write, and the name of their project


def end_run(settings: LoopSettings, accelerator: Accelerator, keep: Path | None = None) -> None:
    """Move the log beside the trained files, remove the state, and close the trackers.

    keep: where to move the state, so that a longer run can continue from it; None: remove it
    """
    if accelerator.is_main_process:
        log = state_file(settings).with_name(LOG)
        if log.exists():
            os.replace(log, settings.folder / LOG)
        if keep is not None:
            os.replace(state_file(settings), keep)
        forget_state(settings)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def make_accelerator(settings: LoopSettings) -> Accelerator:
    """Make the accelerator of this run. Raises UserError if it would use another device than --device."""
    accelerator = _accelerator(settings)
    if settings.device not in (None, accelerator.device.type):
        raise UserError(
            f"--device {settings.device} was asked for, but training would run on {accelerator.device}; "
            "leave --device out"
        )
    return accelerator


def _accelerator(settings: LoopSettings) -> Accelerator:
    # Without being told, accelerate takes processes of torchrun on a CPU for one process each.
    cpu = settings.device == "cpu" or (settings.device is None and not torch.accelerator.is_available())
    if settings.log_with is None:
        return Accelerator(cpu=cpu)
    accelerator = Accelerator(cpu=cpu, log_with=settings.log_with, project_dir=settings.folder)
    if not accelerator.log_with:
        raise UserError(
            f"--log-with {settings.log_with} cannot be used; install it with: pip install {settings.log_with}"
        )
    accelerator.init_trackers(RUNS, config=flat(asdict(settings)))
    return accelerator


def make_trainer(
    planned: TrainingPlan, accelerator: Accelerator, initialise: Callable[[Ensemble], nn.Module]
) -> Trainer:
    """Make everything that a run needs, in memory.

    The VAE leaves the device after the images are encoded, unless images will be decoded.
    initialise: draws the first weights of the trained module with torch's global generator, and returns the
                module
    """
    settings: Any = planned.settings
    ensemble, device = planned.ensemble, accelerator.device
    begun = belongings(settings, planned.own)  # of the files as they are now, before they are read
    vae = ensemble.frame.vae.to(device)
    distilled = planned.teacher is not None
    source, resolution = planned.source, planned.resolution
    data, held_out = (
        encode_captions(settings, source, resolution, settings.recombine)
        if distilled
        else encode_data(settings, source, resolution, vae, buckets=planned.buckets)
    )
    images = None
    if distilled and settings.image_share:
        (images,) = encode_data(
            settings, source, resolution, vae, held_out_too=False, buckets=planned.buckets
        )
    draws = settings.rewarded or settings.sheet_every is not None
    if not draws:
        vae.to("cpu")
    if getattr(settings, "parallel", None) is not None:
        ensemble.denoiser.share_experts()
    ensemble.to(device)
    torch.manual_seed(narrow(settings.seed))
    trained, denoiser = initialise(ensemble), ensemble.denoiser
    settings.set_checkpointing(denoiser)
    context = make_context(settings, ensemble, device)
    if accelerator.is_main_process:
        captions = [sample.caption for sample in planned.source.samples]
        warn_of_prompts(captions, denoiser.interface, ensemble.frame.tokenizers, "caption")
    conditions, sheets = Conditions(ensemble.pipeline(), denoiser, device), None
    if settings.sheet_every is not None:
        watch = make_watch(settings, device)
        sheets = Sheets(settings, ensemble.pipeline(), denoiser, held_out.captions, planned.resolution, watch)
    if settings.cache is not None:
        conditions.keep(Path(settings.cache), [*data.captions, *held_out.captions], settings.batch_size)
        if planned.own:  # a student is written with its text encoders
            _free_encoders(ensemble, vae=not (draws or distilled), to="cpu" if distilled else "meta")
    objectives = make_objectives(context, list(trained.parameters()))
    distillation = make_distillation(planned, objectives.noising, data, held_out, images, accelerator)
    if images is not None:
        data = data.joined(images)
    return Trainer(
        settings,
        accelerator,
        denoiser,
        objectives,
        conditions,
        data,
        held_out,
        trained,
        begun,
        sheets,
        distillation,
    )


def make_distillation(
    planned: TrainingPlan,
    noising: Noising,
    data: Encoded,
    held_out: Encoded,
    images: Encoded | None,
    accelerator: Accelerator,
) -> Distillation | None:
    """Begin what only a distillation has; None for a training on images."""
    if planned.teacher is None:
        return None
    settings: Any = planned.settings
    ensemble, strength = planned.teacher.to(accelerator.device), guidance_of(settings, planned.teacher)
    method = settings.method and teaching_method(ensemble, settings, settings.guidance_in or strength)
    teacher = Teacher(ensemble, accelerator.device, settings.guidance_in, method)
    if settings.cache is not None:
        folder, captions = Path(settings.cache), [*data.captions, *held_out.captions]
        teacher.conditions.keep(folder, captions, settings.batch_size)
        if planned.own:
            _free_encoders(planned.teacher, vae=False, to="cpu")
    own = teacher_samplings(settings, planned.teacher, teacher, noising, held_out, planned.resolution)
    guidance = None if settings.guidance_in is not None else strength
    samples = settings.batch_size - settings.images_in_batch
    samples *= settings.accumulate * accelerator.num_processes
    interface, shape = teacher.denoiser.interface, tuple(own.latents.shape[1:])
    steps = settings.trajectory_steps
    running = Trajectories(noising, interface, shape, len(data), samples, steps, guidance, settings.seed)
    return Distillation(teacher, running if samples else None, own.to(accelerator.device), images)


def teacher_samplings(
    settings: Any, ensemble: Ensemble, teacher: Teacher, noising: Noising, data: Encoded, resolution: int
) -> Batch:
    """Return latents of the teacher's own samplings of some captions, with the run's guidance and steps."""
    side = resolution // noising.latents.factor
    strength = guidance_of(settings, ensemble) if settings.guidance_in is None else settings.guidance_in
    shape, steps = (noising.latents.channels, side, side), settings.trajectory_steps
    return own_samplings(teacher, noising, data, shape, steps, strength, settings.batch_size, settings.seed)


def guidance_of(settings: Any, ensemble: Ensemble) -> float | None:
    """Return the strength of guidance of a student's samplings; None: they are drawn without."""
    denoiser = ensemble.denoiser
    own = denoiser.interface.default_cfg_scale(denoiser.config)
    strength = own if settings.guidance is None else settings.guidance
    return strength if strength > 1 else None


def _free_encoders(ensemble: Ensemble, vae: bool, to: str) -> None:
    """Free the device's memory of the text encoders, which the cache replaces; the ensemble can be saved.

    vae: whether the VAE goes too, since no image will be decoded
    to:  meta, or cpu where they are needed again
    """
    encoders = [encoder for expert in ensemble.experts for encoder in expert.text_encoders]
    for module in (*ensemble.text_encoders, *encoders, *((ensemble.frame.vae,) if vae else ())):
        module.to(to)
