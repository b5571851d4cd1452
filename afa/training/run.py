"""A training run from its settings: experts and data in, a saved ensemble with its measured result out."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from afa import __version__
from afa.aggregators.table import count_parameters
from afa.checkpoint.manifest import MANIFEST, read_manifest
from afa.denoiser.base import only_expert
from afa.devices import choose_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.statistics import Estimate, difference, estimate
from afa.training.conditions import Conditions
from afa.training.estimate import advice, expected
from afa.training.log import LOG, flat
from afa.training.loop import Progress, Trainer
from afa.training.objective import Objective
from afa.training.prepare import encode_data, find_data, resolution_of
from afa.training.settings import LoopSettings, TrainSettings
from afa.training.sources.base import Source
from afa.training.state import FOLDER, check_unchanged, state_file

RUNS = "runs"  # the folder of what trackers write, and the name of their project
LEFT_OUT = "left-out.jsonl"  # the images that could not be used, and why


@dataclass(frozen=True)
class Plan:
    """What a run would do; `--dry-run` stops here. own: the ensemble was loaded for this run alone."""

    settings: LoopSettings
    ensemble: Ensemble
    source: Source
    resolution: int
    own: bool = True

    def facts(self) -> dict[str, Any]:
        """For people and for --json."""
        denoiser, settings = self.ensemble.denoiser, self.settings
        held_out = min(settings.held_out, len(self.source.samples) // 5)
        experts = sum(tensor.numel() * tensor.element_size() for tensor in denoiser.experts.parameters())
        trainable = count_parameters(denoiser.aggregators)
        return {
            "experts": list(denoiser.names),
            "data": self.source.summary(),
            "training_images": len(self.source.samples) - held_out,
            "held_out_images": held_out,
            "resolution": self.resolution,
            "fused_stages": len(denoiser.fused),
            "trainable_parameters": trainable,
            "expert_memory_gb": round(experts / 1e9, 2),
            "aggregator_memory_gb": round(trainable * 4 * 6 / 1e9, 2),  # weights, gradient, two moments, average, best
            "steps": settings.steps,
            "images_a_step": settings.batch_size * settings.accumulate,
        }

    def memory(self) -> dict[str, Any]:
        """What a step is expected to need, and what would make it less; takes as long as a few steps."""
        settings, frame = self.settings, self.ensemble.frame
        dtype = getattr(torch, settings.dtype)
        beside = [] if settings.cache is not None else [frame.vae, *self.ensemble.text_encoders]
        side = self.resolution // 2 ** (len(frame.vae.config["block_out_channels"]) - 1)
        found = expected(self.ensemble.denoiser, beside, settings.batch_size, side, dtype, settings.gradient_checkpointing)
        less = advice(found, checkpointing=settings.gradient_checkpointing, dtype=dtype, cached=not beside, batch_size=settings.batch_size)
        return {"expected_memory_gb": round(found.total / 1e9, 2), "for_less_memory": less}


def plan(settings: TrainSettings, ensemble: Ensemble | None = None) -> Plan:
    """Read data and experts, and find everything that would fail later. Raises UserError.

    ensemble: the one to train, where its experts are in memory already.
    """
    source = find_data(settings)
    check_output(settings)
    if settings.device is not None:
        choose_device(settings.device)
    own = ensemble is None
    ensemble = ensemble or Ensemble.from_experts(
        settings.experts,
        aggregator=settings.aggregator,
        placement=settings.placement,
        attention_up_to=settings.attention_up_to,
        vae=settings.vae,
        dtype=getattr(torch, settings.dtype),
        config=settings.config,
        **settings.aggregator_options(),
    )
    return Plan(settings, ensemble, source, resolution_of(settings, ensemble), own)


def check_output(settings: LoopSettings) -> None:
    output = Path(settings.output)
    if output.is_file():
        raise UserError(f"--output {output} is a file; give a folder")
    if (output / MANIFEST).exists() or state_file(settings).exists() or not output.exists():
        return
    if any(path.name not in (FOLDER, RUNS) for path in output.iterdir()):
        raise UserError(f"--output {output} holds other files; give a new or empty folder")


def finished(settings: TrainSettings) -> dict[str, Any] | None:
    """The record of a run that is complete, None if there is none. Raises UserError if it was another run."""
    if not (Path(settings.output) / MANIFEST).exists() or state_file(settings).exists():
        return None
    record = read_manifest(Path(settings.output)).training
    if record is None or "settings" not in record:
        raise UserError(f"{settings.output} holds an ensemble that was not trained here; give another --output")
    begun = TrainSettings(**record["settings"])
    if settings.steps != begun.steps:  # its state is gone, so it cannot go on
        raise UserError(f"the ensemble in {settings.output} was finished with --steps {begun.steps} (now {settings.steps}); choose another --output")
    check_unchanged(settings, json.loads(json.dumps(begun.binding())), f"the ensemble in {settings.output}")
    return record


def train(settings: TrainSettings, planned: Plan | None = None) -> dict[str, Any]:
    """Train, save the ensemble into settings.output, and return the record kept in its manifest.

    Resumes from a saved state; a complete run is only read. Raises UserError, or KeyboardInterrupt with the state saved.
    """
    done = finished(settings)
    if done is not None:
        return done
    planned = planned or plan(settings)
    accelerator = make_accelerator(settings)
    trainer = make_trainer(planned, accelerator, _initialise)
    baselines = _baselines(trainer)
    progress = trainer.train()
    record = _record(settings, trainer, progress, baselines) | {"left_out": planned.source.skipped.counts()}
    if accelerator.is_main_process:
        planned.ensemble.training = record
        planned.ensemble.save(settings.output)
        planned.source.skipped.write(Path(settings.output) / LEFT_OUT)
        keep_log(settings)
        shutil.rmtree(Path(settings.output) / FOLDER, ignore_errors=True)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return record


def keep_log(settings: LoopSettings) -> None:
    """Move the log beside what was trained."""
    log = state_file(settings).with_name(LOG)
    if log.exists():
        os.replace(log, Path(settings.output) / LOG)


def make_accelerator(settings: LoopSettings) -> Accelerator:
    """The processes and devices of this run. Raises UserError if they are not what was asked for."""
    accelerator = _accelerator(settings)
    if settings.device not in (None, accelerator.device.type):
        raise UserError(f"--device {settings.device} was asked for, but training would run on {accelerator.device}; leave --device out")
    return accelerator


def _accelerator(settings: LoopSettings) -> Accelerator:
    if settings.log_with is None:
        return Accelerator(cpu=settings.device == "cpu")
    accelerator = Accelerator(cpu=settings.device == "cpu", log_with=settings.log_with, project_dir=settings.output)
    if not accelerator.log_with:
        raise UserError(f"--log-with {settings.log_with} cannot be used; install it with: pip install {settings.log_with}")
    accelerator.init_trackers(RUNS, config=flat(asdict(settings)))
    return accelerator


def make_trainer(planned: Plan, accelerator: Accelerator, initialise: Callable[[Ensemble], nn.Module]) -> Trainer:
    """Everything a run needs, in memory; the VAE has done its work and is not moved to the device for good.

    initialise: draws the first weights of what is trained, by torch's own generator, and returns it.
    """
    settings, ensemble = planned.settings, planned.ensemble
    vae = ensemble.frame.vae.to(accelerator.device)
    data, held_out = encode_data(settings, planned.source, planned.resolution, vae)
    config = vae.config
    vae.to("cpu")
    ensemble.to(accelerator.device)
    torch.manual_seed(settings.seed)
    trained = initialise(ensemble)
    if settings.gradient_checkpointing:
        ensemble.denoiser.enable_gradient_checkpointing()
    objective = Objective(ensemble.frame.scheduler, config["scaling_factor"], config.get("shift_factor"), accelerator.device, settings.snr_gamma)
    conditions = Conditions(ensemble.pipeline(), accelerator.device)
    if settings.cache is not None:
        conditions.keep(Path(settings.cache), [*data.captions, *held_out.captions], settings.batch_size)
        if planned.own:
            _forget(ensemble)
    return Trainer(settings, accelerator, ensemble.denoiser, objective, conditions, data, held_out, trained)


def _forget(ensemble: Ensemble) -> None:
    """Free the memory of what the cache stands for; the ensemble can still be trained and saved, but draws nothing any more."""
    for module in (ensemble.frame.vae, *ensemble.text_encoders, *(encoder for expert in ensemble.experts for encoder in expert.text_encoders)):
        module.to("meta")


def _initialise(ensemble: Ensemble) -> nn.Module:
    """Draw the aggregators' first weights anew, so that --seed decides them whatever was loaded before."""
    denoiser = ensemble.denoiser
    device = next(denoiser.experts.parameters()).device
    for name, fresh in denoiser._aggregators().items():
        denoiser.aggregators[name] = fresh.to(device)
    return denoiser.aggregators


def _baselines(trainer: Trainer) -> dict[str, np.ndarray]:
    """Held-out losses, per image, of the untrained mean and of each expert alone in the same frame."""
    losses = {"untrained mean": trainer.held_out_losses()}
    for name in trainer.denoiser.names:
        with only_expert(trainer.denoiser, name):
            losses[name] = trainer.held_out_losses()
    return losses


def _record(settings: TrainSettings, trainer: Trainer, progress: Progress, baselines: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the manifest keeps: recipe, course and measured result. Differences are paired over the held-out images."""
    trained = trainer.held_out_losses()
    losses: dict[str, Estimate] = {"trained": estimate(trained)} | {name: estimate(values) for name, values in baselines.items()}
    best = min(trainer.denoiser.names, key=lambda name: baselines[name].mean())
    return {
        "settings": asdict(settings),
        "afa": __version__,
        "torch": torch.__version__,
        "training_images": len(trainer.data),
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.seconds, 1),
        "held_out_loss": {name: asdict(value) for name, value in losses.items()},
        "best_expert": best,
        "difference_to_best_expert": asdict(difference(trained, baselines[best])),
        "difference_to_untrained_mean": asdict(difference(trained, baselines["untrained mean"])),
        "history": progress.history,
    }
