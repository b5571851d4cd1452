"""A training run: settings, experts and data in; a saved ensemble with its measured result out."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.checkpoint.manifest import MANIFEST, read_manifest
from afa.defaults import WHY
from afa.denoiser.parallel import check_parallel
from afa.devices import choose_device, process_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.expert import Expert
from afa.experts.load import load_experts
from afa.experts.locate import hash_expert
from afa.experts.quantised import check_store, store_weights
from afa.files import locked, present, refuse_busy, settled
from afa.schema import build
from afa.stats import difference
from afa.training.choices import as_begun, chosen, following, not_given
from afa.training.log import LOG
from afa.training.loop import Progress, Trainer
from afa.training.plan import TrainingPlan
from afa.training.prepare import buckets_of, check_objective, find_data, resolution_of, training_images
from afa.training.record import LEFT_OUT, check_more_steps, check_record, run_record
from afa.training.settings import LoopSettings, TrainSettings
from afa.training.setup import RUNS, end_run, make_accelerator, make_trainer
from afa.training.sheets import FOLDER as SHEETS
from afa.training.state import FOLDER, begun_with, go_on, kept_file, state_file

# with what a new ensemble is compared, and one that is trained further
UNTRAINED, STARTED = "untrained", "as it was begun with"


def plan(settings: TrainSettings, ensemble: Ensemble | None = None) -> TrainingPlan:
    """Read data and experts, and find everything that would fail later.

    ensemble: the one to train, if its experts are in memory already
    Raises UserError.
    """
    process_device(settings.device)  # first of all: it says how processes communicate
    source = find_data(settings)
    check_output(settings)
    own, images = ensemble is None, training_images(source, settings)
    given, begun = settings, begun_with(settings)
    settings, ensemble = _whole(following(settings, begun), ensemble, images)
    chosen_here = {name: "as this run was begun" if begun else WHY[name] for name in not_given(given)}
    check_store(settings.store, choose_device(settings.device))
    if settings.store is not None:
        store_weights(ensemble.denoiser.experts, settings.store)
    if ensemble.denoiser.reuse is not None:
        raise UserError("steps that are reused cannot be trained; set ensemble.denoiser.reuse = None first")
    if len(ensemble.denoiser.names) < 2:
        raise UserError(
            f"'{ensemble.denoiser.names[0]}' is one expert alone, and there is nothing to weigh; "
            "an ensemble needs at least two"
        )
    resolution, buckets = resolution_of(settings, ensemble), buckets_of(settings, ensemble, source)
    check_objective(settings, ensemble, source, buckets)
    more = {"buckets": buckets}
    return TrainingPlan(settings, ensemble, source, resolution, own, settings.store, chosen_here, **more)


def _whole(settings: TrainSettings, ensemble: Ensemble | None, images: int) -> tuple[TrainSettings, Ensemble]:
    """Return the settings with every option, and the ensemble, which is made or loaded if it is not there.

    images: that are trained on
    """
    dtype = getattr(torch, settings.dtype)
    if settings.start is not None and ensemble is None:
        ensemble = Ensemble.load(settings.start, dtype=dtype, aggregators_dtype=torch.float32)
    if ensemble is not None:
        return chosen(settings, images, denoiser=ensemble.denoiser), ensemble
    experts = load_experts(settings.experts or (), dtype, settings.config, settings.prediction_type)
    settings = chosen(settings, images, experts)
    return settings, _ensemble(settings, experts)


def _ensemble(settings: TrainSettings, experts: Sequence[Expert]) -> Ensemble:
    """Make an ensemble with new aggregators."""
    assert settings.aggregator is not None
    return Ensemble.from_experts(
        experts,
        aggregator=settings.aggregator,
        placement=settings.placement,
        attention_up_to=settings.attention_up_to,
        text_stream=settings.text_stream,
        vae=settings.vae,
        frame=settings.frame,
        text_encoders=settings.text_encoder or (),
        dtype=getattr(torch, settings.dtype),
        config=settings.config,
        prediction_type=settings.prediction_type,
        **settings.aggregator_options(),
    )


def check_output(settings: LoopSettings) -> None:
    output = settings.folder
    if output.is_file():
        raise UserError(f"--output {output} is a file; give a folder")
    refuse_busy(output)
    there = {path.name for path in present(output)}
    if MANIFEST not in there and not state_file(settings).exists() and there - {FOLDER, RUNS, SHEETS}:
        raise UserError(f"--output {output} holds other files; give a new or empty folder")


def finished(settings: TrainSettings) -> dict[str, Any] | None:
    """Return the record of a complete run; None if there is none. Raises UserError if it was another run."""
    if not (settled(Path(settings.output)) / MANIFEST).exists() or state_file(settings).exists():
        return None
    record = read_manifest(Path(settings.output)).training
    if record is None or "settings" not in record:
        raise UserError(
            f"{settings.output} holds an ensemble that was not trained here; give another --output"
        )
    recorded, file = as_begun(record["settings"]), Path(settings.output) / MANIFEST
    begun: TrainSettings = build(TrainSettings.current(), recorded, file, "training.settings")
    settings = following(settings, recorded)
    what = f"the ensemble in {settings.output}"
    if settings.steps > begun.steps:
        further = f"train it further with --start {settings.output}, or begin anew, both with"
        check_more_steps(settings, begun, record, what, further)
        return None
    check_record(settings, begun, record, what)
    return record


def train(settings: TrainSettings, planned: TrainingPlan | None = None, keep: bool = True) -> dict[str, Any]:
    """Train an ensemble and save it in settings.output.

    An interrupted run continues, and so does a finished one of which more steps are asked for; else a
    finished run is only read.

    settings: the options of `afa train`
    planned:  what plan(settings) returned, if the experts are in memory already
    keep:     keep the last state in the folder, five times as large as the aggregators in float32, so that
              more steps can go on from it
    Returns the record that is kept in afa.json: settings, steps, held-out losses with intervals.
    Raises UserError, and KeyboardInterrupt after the state is saved.
    """
    with contextlib.ExitStack() as stack:
        if finished(settings) is None:
            stack.enter_context(locked(Path(settings.output)))
        return finished(settings) or _train(planned or plan(settings), keep)


def _train(planned: TrainingPlan, keep: bool) -> dict[str, Any]:
    settings: Any = planned.settings
    accelerator = make_accelerator(settings)
    check_parallel(settings.parallel, accelerator.num_processes, len(planned.ensemble.names), "train")
    if accelerator.is_main_process:
        go_on(settings, LOG)
    accelerator.wait_for_everyone()
    trainer = make_trainer(
        planned,
        accelerator,
        _initialise if settings.start is None else lambda ensemble: ensemble.denoiser.aggregators.float(),
    )
    for expert in planned.ensemble.experts:
        expert.hashes = expert.hashes or ({} if expert.located is None else hash_expert(expert.located))
    progress = trainer.train()
    before = UNTRAINED if settings.start is None else STARTED
    record = _record(trainer, progress, before) | {
        "chosen_by_afa": list(planned.chosen),
        "left_out": planned.source.skipped.counts(),
    }
    if accelerator.is_main_process:
        planned.ensemble.training = record
        planned.ensemble.save(settings.output)
        planned.source.skipped.write(Path(settings.output) / LEFT_OUT)
    end_run(settings, accelerator, kept_file(settings) if keep else None)
    return record


def _initialise(ensemble: Ensemble) -> nn.Module:
    """Draw the aggregators' first weights again, so that they depend on --seed only."""
    denoiser = ensemble.denoiser
    device = next(denoiser.experts.parameters()).device
    for name, fresh in denoiser._aggregators().items():
        denoiser.aggregators[name] = fresh.to(device)
    return denoiser.aggregators


def _record(trainer: Trainer, progress: Progress, before: str) -> dict[str, Any]:
    """Return what the manifest records; differences are paired over the held-out images.

    before: UNTRAINED or STARTED
    """
    trained, first = trainer.held_out.measure(trainer.denoiser, whole=True), trainer.before
    assert first is not None
    best = min(first.experts, key=lambda name: first.experts[name].mean())
    to_before = "difference_to_untrained" if before == UNTRAINED else "difference_to_start"
    losses = {"trained": trained.losses, before: first.losses, **first.experts}
    return {
        **run_record(trainer, progress, losses),
        "best_expert": best,
        "difference_to_best_expert": asdict(difference(trained.losses, first.experts[best])),
        to_before: asdict(difference(trained.losses, first.losses)),
        "weights_moved": first.moved(trained),
    }
