"""Rows of LoRA controls: the best expert, or the merge of all, fine-tuned as the ensemble was trained.

Source of merge and continue: Chen et al., MapReduce LoRA, arXiv:2511.20629, which merges experts, trains them
further from the merge, and merges again. Deviation: there every expert is trained by a reward of its own;
here the merge is trained on the ensemble's data, and the experts of the second merge are the given ones.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from afa.checkpoint.manifest import read_manifest
from afa.ensemble import Ensemble
from afa.evaluation.names import chosen_methods
from afa.evaluation.rows import MethodRow, Options, Train, Trained
from afa.evaluation.setup import Setup
from afa.evaluation.untrained import merged_sampler
from afa.experts.expert import Expert
from afa.experts.lora import fuse
from afa.merging.memory import merge_experts
from afa.sampling.sample import Sampler
from afa.training.finetune import (
    FILE,
    equal_compute_steps,
    finetune,
    finetune_finished,
    fuse_lora,
    matching_rank,
    plan_finetune,
)
from afa.training.finetune_settings import LoraSettings
from afa.training.settings import LoopSettings
from afa.training.state import begin_from

COMPUTE = "_compute"  # ends the names of rows at equal compute
CONTINUED = "merge_and_continue"
KEPT = "last-state.pt"  # of a run to equal steps, until the run to equal compute continues it
RATES = (1.0, 0.25)  # of the ensemble's learning rate: the better by held-out loss is taken
Start = Callable[[Setup], Expert]  # -> the model that is fine-tuned, to be changed
MakeSampler = Callable[[Options, int], Sampler]


def control_rows(setup: Setup) -> list[MethodRow]:
    """Return five rows, each with at least as many trained parameters as the ensemble."""
    starts: dict[str, tuple[str, Start]] = {
        "finetune_best": ("LoRA on the best expert", best_expert),
        "finetune_merge": ("LoRA on the weighted merge", weighted_merge),
    }
    rows = []
    for kind, (title, start) in starts.items():
        for name, equal in ((kind, "steps"), (f"{kind}{COMPUTE}", "compute")):
            train = functools.partial(_train, setup, name, start)
            sampler = functools.partial(_sampler, setup, start, train)
            rows.append(_row(setup, name, f"{title}, equal {equal}", train, sampler))
    train, sampler = (functools.partial(make, setup) for make in (_train_rounds, _sampler_of_rounds))
    return [*rows, _row(setup, CONTINUED, "merge and continue, equal compute", train, sampler)]


def _row(setup: Setup, name: str, title: str, train: Train, sampler: MakeSampler) -> MethodRow:
    return MethodRow(
        name,
        "control",
        title,
        sampler,
        tuple({"lr": rate} for rate in RATES),
        train=train,
        by_loss=True,
        runs=setup.settings.seeds,
        note="lr: times the ensemble's",
    )


def best_expert(setup: Setup) -> Expert:
    """Return a copy of the best expert, its LoRAs fused into its weights, with the ensemble's VAE."""
    best = setup.expert(setup.ranking[0])
    return replace(best, model=fuse(copy.deepcopy(best.model)), vae=setup.ensemble.frame.vae)


def weighted_merge(setup: Setup) -> Expert:
    """Return the mean of all experts' weights, with the ensemble's VAE."""
    return replace(merge_experts(setup.ensemble.experts, "weighted"), vae=setup.ensemble.frame.vae)


def _train(setup: Setup, name: str, start: Start, options: Options, run: int) -> Trained:
    """Train with the ensemble's recipe, or read what was trained before.

    A run to equal compute continues the run to equal steps.
    """
    trained, place = setup.output / "trained", Path(f"lr-{options['lr']:g}") / f"seed-{run}"
    folder = trained / name / place
    settings = _settings(setup, start, name.endswith(COMPUTE), options, run, folder)
    record = finetune_finished(settings)
    if record is None:
        state = PartialState()
        if name.endswith(COMPUTE):
            if state.is_main_process and not folder.exists():
                begin_from(settings, trained / name.removesuffix(COMPUTE) / place / KEPT)
            state.wait_for_everyone()
        kept = folder / KEPT if f"{name}{COMPUTE}" in chosen_methods(setup.settings.methods) else None
        return _finetune(setup, start, settings, kept)
    return _trained(folder, record)


def _finetune(setup: Setup, start: Start, settings: LoraSettings, kept: Path | None = None) -> Trained:
    """Train a LoRA on a model, or read what was trained before. kept: see finetune()."""
    record = finetune_finished(settings)
    if record is None:
        alone = Ensemble.from_experts([start(setup)], aggregator="mean", placement="out")
        record = finetune(settings, plan_finetune(settings, alone), kept)
    return _trained(Path(settings.output), record)


def _trained(folder: Path, record: Mapping[str, Any]) -> Trained:
    loss = record["held_out_loss"]["trained"]["value"]
    return Trained(folder, folder / FILE, record["parameters"], record["steps"], record["seconds"], loss)


def _train_rounds(setup: Setup, options: Options, run: int) -> Trained:
    """Train a LoRA on the merge, merge the result with the experts, and train another on that.

    Each round has half of the steps that cost as much as the ensemble's training. Both draw the same batches
    and noise, since the seed decides what is held out, too.
    """
    trained = setup.output / "trained" / CONTINUED / f"lr-{options['lr']:g}" / f"seed-{run}"
    rounds: list[Trained] = []
    for number in (1, 2):
        start: Start = weighted_merge if not rounds else functools.partial(_merged_again, file=rounds[0].file)
        settings = _settings(setup, weighted_merge, True, options, run, trained / f"round-{number}")
        steps = settings.steps // 2 if number == 1 else settings.steps - settings.steps // 2
        rounds.append(_finetune(setup, start, replace(settings, steps=max(1, steps))))
    first, second = rounds
    return replace(
        second,
        parameters=first.parameters + second.parameters,
        steps=first.steps + second.steps,
        seconds=first.seconds + second.seconds,
    )


def _merged_again(setup: Setup, file: Path) -> Expert:
    """Return the mean of the trained merge, which counts half, and of the experts.

    file: the LoRA of the first round
    """
    trained, experts = weighted_merge(setup), setup.ensemble.experts
    fuse_lora(trained.model, file)
    weights = [float(len(experts)), *[1.0] * len(experts)]
    merged = merge_experts([trained, *experts], "weighted", weights=weights)
    return replace(merged, vae=setup.ensemble.frame.vae)


def _sampler_of_rounds(setup: Setup, options: Options, run: int) -> Sampler:
    """Return a stock pipeline around the merge of the second round, with its LoRA fused."""
    trained = _train_rounds(setup, options, run)
    expert = _merged_again(setup, trained.folder.with_name("round-1") / FILE)
    fuse_lora(expert.model, trained.file)
    return merged_sampler(setup, expert)


def _settings(
    setup: Setup, start: Start, by_compute: bool, options: Options, run: int, folder: Path
) -> LoraSettings:
    """Return the ensemble's settings with a scaled rate, and with more steps for equal compute."""
    ensemble = setup.training(folder, run)
    shared = {field.name: getattr(ensemble, field.name) for field in fields(LoopSettings)}
    if ensemble.anchor_to == "mean":  # what is of several experts does not apply to one
        shared |= {"anchor": 0.0, "anchor_to": "start"}
    expert = setup.ensemble.experts[0].model
    rank = matching_rank(expert, read_manifest(setup.folder).aggregator["parameters"])
    steps = _equal_steps(setup, rank, ensemble.steps, ensemble.batch_size) if by_compute else ensemble.steps
    source = setup.ranking[0] if start is best_expert else "+".join(setup.names)
    return LoraSettings(
        **{**shared, "expert": source, "rank": rank, "lr": ensemble.lr * options["lr"], "steps": steps}
    )


@functools.lru_cache(maxsize=1)
def _equal_steps(setup: Setup, rank: int, steps: int, batch_size: int) -> int:
    return equal_compute_steps(steps, setup.ensemble.denoiser, rank, batch_size)


def _sampler(setup: Setup, start: Start, train: Train, options: Options, run: int) -> Sampler:
    """Return a stock pipeline around the expert, with the trained LoRA fused into its weights."""
    expert = start(setup)
    fuse_lora(expert.model, train(options, run).file)
    return merged_sampler(setup, expert)
