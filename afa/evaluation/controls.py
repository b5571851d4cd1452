"""The rows of trained controls: a LoRA on the best expert and on the weighted merge, at equal steps and at equal compute."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

from afa.checkpoint.manifest import read_manifest
from afa.controls.compute import equal_compute_steps
from afa.controls.lora import FILE, fuse_lora, matching_rank
from afa.controls.run import finetune, finished, plan
from afa.controls.settings import LoraSettings
from afa.ensemble import Ensemble
from afa.evaluation.merges import merged_sampler
from afa.evaluation.names import chosen_methods
from afa.evaluation.rows import Options, Row, Trained
from afa.evaluation.setup import Setup
from afa.experts.adapters import fuse
from afa.experts.load import Expert
from afa.generation.sample import Sampler
from afa.merging.memory import merge_experts
from afa.training.settings import LoopSettings
from afa.training.state import begin_from

COMPUTE = "_compute"  # ends the names of rows at equal compute
KEPT = "last-state.pt"  # of a run to equal steps, until the one to equal compute takes it over
RATES = (1.0, 0.25)  # of the ensemble's learning rate: the better by held-out loss is taken


def control_rows(setup: Setup) -> list[Row]:
    """Four rows; as many trained parameters as the ensemble has, never fewer."""
    kinds: dict[str, tuple[str, Callable[[Setup], Expert]]] = {
        "finetune_best": ("LoRA on the best expert", _best),
        "finetune_merge": ("LoRA on the weighted merge", _merge),
    }
    return [
        _row(setup, f"{name}{ending}", f"{title}, equal {equal}", start, equal == "compute")
        for name, (title, start) in kinds.items()
        for ending, equal in (("", "steps"), (COMPUTE, "compute"))
    ]


def _row(setup: Setup, name: str, title: str, start: Callable[[Setup], Expert], by_compute: bool) -> Row:
    train = functools.partial(_train, setup, name, start, by_compute)
    candidates = tuple({"lr": rate} for rate in RATES)
    sampler = functools.partial(_sampler, setup, start, train)
    return Row(name, "control", title, sampler, candidates, train=train, by_loss=True, runs=setup.settings.seeds, note="lr: times the ensemble's")


def _best(setup: Setup) -> Expert:
    """A copy of the expert that was ranked best, its denoiser to be changed, trained with the VAE the ensemble was trained with."""
    best = dict(zip(setup.names, setup.ensemble.experts, strict=True))[setup.ranking[0]]
    return dataclasses.replace(best, model=fuse(copy.deepcopy(best.model)), vae=setup.ensemble.frame.vae)


def _merge(setup: Setup) -> Expert:
    """The mean of all experts' weights, with the ensemble's VAE."""
    return dataclasses.replace(merge_experts(setup.ensemble.experts, "weighted"), vae=setup.ensemble.frame.vae)


def _train(setup: Setup, name: str, start: Callable[[Setup], Expert], by_compute: bool, options: Options, run: int) -> Trained:
    """Train with the ensemble's recipe; what is trained is only read. A run to equal compute goes on from that to equal steps."""
    place = Path(f"lr-{options['lr']:g}") / f"seed-{run}"
    folder = setup.output / "trained" / name / place
    settings = _settings(setup, start, by_compute, options, run, folder)
    record = finished(settings)
    if record is None:
        if by_compute:
            _go_on(settings, setup.output / "trained" / name.removesuffix(COMPUTE) / place / KEPT)
        kept = folder / KEPT if f"{name}{COMPUTE}" in chosen_methods(setup.settings.methods) else None
        record = finetune(settings, plan(settings, Ensemble.from_experts([start(setup)], aggregator="mean", placement="out")), kept)
    return Trained(folder, folder / FILE, record["parameters"], record["steps"], record["seconds"], record["held_out_loss"]["trained"]["value"])


def _go_on(settings: LoraSettings, place: Path) -> None:
    """Let a run that has not begun go on from where a shorter one ended."""
    state = PartialState()
    if state.is_main_process and not Path(settings.output).exists():
        begin_from(settings, place)
    state.wait_for_everyone()


def _settings(setup: Setup, start: Callable[[Setup], Expert], by_compute: bool, options: Options, run: int, folder: Path) -> LoraSettings:
    """The ensemble's own settings, with its rate scaled, and its steps where compute is to be equal."""
    ensemble = setup.training(folder, run)
    shared = {field.name: getattr(ensemble, field.name) for field in dataclasses.fields(LoopSettings)}
    expert = setup.ensemble.experts[0].model
    rank = matching_rank(expert, read_manifest(setup.folder).aggregator["parameters"])
    steps = _equal_steps(setup, rank, ensemble.steps, ensemble.batch_size) if by_compute else ensemble.steps
    source = setup.ranking[0] if start is _best else "+".join(setup.names)
    return LoraSettings(**{**shared, "expert": source, "rank": rank, "lr": ensemble.lr * options["lr"], "steps": steps})


@functools.lru_cache(maxsize=1)
def _equal_steps(setup: Setup, rank: int, steps: int, batch_size: int) -> int:
    return equal_compute_steps(steps, setup.ensemble.denoiser, rank, batch_size)


def _sampler(setup: Setup, start: Callable[[Setup], Expert], train: Callable[[Options, int], Trained], options: Options, run: int) -> Sampler:
    """A stock pipeline around the expert with its LoRA in its weights."""
    expert = start(setup)
    fuse_lora(expert.model, train(options, run).file)
    return merged_sampler(setup, expert)
