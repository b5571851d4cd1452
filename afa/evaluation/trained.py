"""Rows that are trained first: ensembles, routers, LoRA controls, studies of objectives."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from afa.aggregators.registry import find_aggregator
from afa.checkpoint.manifest import AGGREGATORS, read_manifest
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.placement import fused_stages
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.names import chosen_methods
from afa.evaluation.rows import MethodRow, Options, Trained
from afa.evaluation.setup import Setup
from afa.evaluation.untrained import merged_sampler
from afa.experts.expert import Expert
from afa.experts.lora import fuse
from afa.merging.memory import merge_experts
from afa.sampling.sample import Sampler, sample
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
from afa.training.objective_registry import PLAIN
from afa.training.run import finished, plan, train
from afa.training.settings import LoopSettings, TrainSettings
from afa.training.state import begin_from

# title -> what is changed in the ensemble's own recipe; what it already is, is left out
ABLATIONS: dict[str, dict[str, Any]] = {
    "one path (sabw)": {"aggregator": "sabw"},
    "own paths (stitch)": {"aggregator": "stitch"},
    "no text": {"ignore": ["text"]},
    "no time": {"ignore": ["time"]},
    "no spatial map": {"ignore": ["place"]},
    "depth 0": {"depth": 0},
    "depth 1": {"depth": 1},
    "depth 2": {"depth": 2},
    "text tokens fused": {"text_stream": "fused"},
    "placement layers": {"placement": "layers"},
    "placement blocks": {"placement": "blocks"},
    "placement out": {"placement": "out"},
}


def trained_rows(setup: Setup) -> list[MethodRow]:
    """The prediction router, and the ensemble."""
    router = functools.partial(_train, setup, "prediction_router", {"placement": "out"})
    return [
        _row(setup, "prediction_router", "control", "prediction router", router, cost="all experts"),
        _row(setup, "afa", "ours", "AFA", functools.partial(afa_run, setup)),
    ]


def ablation_rows(setup: Setup) -> list[MethodRow]:
    """The ensemble's recipe with one thing changed, trained anew."""
    denoiser = setup.ensemble.denoiser
    recorded = setup.training(
        setup.output, 0, placement=denoiser.placement
    )  # the family's, where nobody chose one
    changed = {
        title: changes
        for title, changes in ABLATIONS.items()
        if any(_value(recorded, name) != value for name, value in changes.items())
    }
    changed = {title: changes for title, changes in changed.items() if _differs(denoiser, changes)}
    return [
        _row(
            setup,
            f"afa, {title}",
            "ours",
            title,
            functools.partial(_train, setup, folder_name(title), changes),
            axes={"variant": title},
            of="afa",
        )
        for title, changes in changed.items()
    ]


def _differs(denoiser: EnsembleDenoiser, changes: Mapping[str, Any]) -> bool:
    """Whether a change makes a difference here.

    These aggregators may not have the option; blocks of the family may not change text tokens, or be stages
    already.
    """
    options = (field.name for field in dataclasses.fields(find_aggregator(denoiser.recipe.kind).options))
    if not changes.keys() <= {"aggregator", "placement", "text_stream", *options}:
        return False
    if "text_stream" in changes:
        return denoiser.call.changes_text
    return "placement" not in changes or fused_stages(changes["placement"], denoiser.stages) != denoiser.fused


def expert_rows(setup: Setup) -> list[MethodRow]:
    """The ensemble of the two best experts, of the three best …, trained anew; of all.

    The ensemble itself.
    """
    specs = dict(zip(setup.names, setup.expert_specs(), strict=True))
    rows = []
    for count in range(2, len(setup.names)):
        chosen = [name for name in setup.names if name in setup.ranking[:count]]
        changes = {"experts": [specs[name] for name in chosen], "vae": None}
        train_them = functools.partial(_train, setup, f"experts-{'-'.join(chosen)}", changes)
        title = f"AFA of {', '.join(chosen)}"
        rows.append(
            _row(
                setup,
                f"afa, {count} experts",
                "ours",
                title,
                train_them,
                axes={"experts": count},
                of="afa",
                names=chosen,
            )
        )
    return rows


def _value(recorded: Any, name: str) -> Any:
    value = getattr(recorded, name)
    return list(value) if isinstance(value, (list, tuple)) else value


def folder_name(title: str) -> str:
    """A title as a folder is called."""
    return "".join(letter if letter.isalnum() else "-" for letter in title).strip("-")


def _row(
    setup: Setup,
    name: str,
    group: str,
    title: str,
    make: Any,
    *,
    axes: Mapping[str, Any] | None = None,
    of: str = "",
    names: Sequence[str] = (),
    cost: str = "ensemble",
) -> MethodRow:
    sampler = functools.partial(trained_sampler, setup, make, tuple(names))
    runs = setup.settings.seeds
    return MethodRow(name, group, title, sampler, train=make, runs=runs, axes=axes or {}, of=of, cost=cost)


def afa_run(setup: Setup, options: Options, run: int) -> Trained:
    """The ensemble as it was given, and its like at later seeds."""
    return read_trained(setup.folder) if run == 0 else _train(setup, "afa", {}, options, run)


def _train(setup: Setup, name: str, changes: dict[str, Any], options: Options, run: int) -> Trained:
    """Train by the ensemble's recipe with some changes, on experts that are in memory already.

    What is trained is only read.
    """
    settings = setup.training(setup.output / "trained" / name / f"seed-{run}", run, **changes)
    if finished(settings) is None:
        shared = None
        if (
            settings.experts == setup.expert_specs()
            and settings.dtype == setup.settings.dtype
            and settings.store is None
        ):
            shared = setup.ensemble.sharing(
                settings.aggregator,
                settings.placement,
                attention_up_to=settings.attention_up_to,
                text_stream=settings.text_stream,
                **settings.aggregator_options(),
            )
        train(settings, plan(settings, shared))
    return read_trained(Path(settings.output))


def read_trained(folder: Path) -> Trained:
    """What training left in a folder."""
    manifest = read_manifest(folder)
    record = manifest.training or {}
    return Trained(
        folder,
        folder / AGGREGATORS,
        manifest.aggregator["parameters"],
        record.get("steps", 0),
        record.get("seconds", 0.0),
        record.get("held_out_loss", {}).get("trained", {}).get("value", float("nan")),
    )


def trained_sampler(setup: Setup, make: Any, names: tuple[str, ...], options: Options, run: int) -> Sampler:
    """A stock pipeline around the trained ensemble; experts in memory are shared."""
    folder = make(options, run).folder
    if names:
        from afa.ensemble import Ensemble

        by_name = dict(zip(setup.names, setup.ensemble.experts, strict=True))
        ensemble = Ensemble.from_experts([by_name[name] for name in names], aggregators=folder)
    else:
        ensemble = setup.ensemble.sharing(aggregators=folder)
    return functools.partial(sample, setup.pipeline(ensemble))


COMPUTE = "_compute"  # ends the names of rows at equal compute
KEPT = "last-state.pt"  # of a run to equal steps, until the one to equal compute takes it over
RATES = (1.0, 0.25)  # of the ensemble's learning rate: the better by held-out loss is taken


def control_rows(setup: Setup) -> list[MethodRow]:
    """Four rows; as many trained parameters as the ensemble has, never fewer."""
    kinds: dict[str, tuple[str, Callable[[Setup], Expert]]] = {
        "finetune_best": ("LoRA on the best expert", _best),
        "finetune_merge": ("LoRA on the weighted merge", _merge),
    }
    return [
        _control_row(setup, f"{name}{ending}", f"{title}, equal {equal}", start, equal == "compute")
        for name, (title, start) in kinds.items()
        for ending, equal in (("", "steps"), (COMPUTE, "compute"))
    ]


def _control_row(
    setup: Setup, name: str, title: str, start: Callable[[Setup], Expert], by_compute: bool
) -> MethodRow:
    train = functools.partial(_train_control, setup, name, start, by_compute)
    candidates = tuple({"lr": rate} for rate in RATES)
    sampler = functools.partial(_sampler, setup, start, train)
    return MethodRow(
        name,
        "control",
        title,
        sampler,
        candidates,
        train=train,
        by_loss=True,
        runs=setup.settings.seeds,
        note="lr: times the ensemble's",
    )


def _best(setup: Setup) -> Expert:
    """A copy of the best-ranked expert: its denoiser is to be trained, its VAE is the ensemble's."""
    best = dict(zip(setup.names, setup.ensemble.experts, strict=True))[setup.ranking[0]]
    return dataclasses.replace(best, model=fuse(copy.deepcopy(best.model)), vae=setup.ensemble.frame.vae)


def _merge(setup: Setup) -> Expert:
    """The mean of all experts' weights, with the ensemble's VAE."""
    return dataclasses.replace(
        merge_experts(setup.ensemble.experts, "weighted"), vae=setup.ensemble.frame.vae
    )


def _train_control(
    setup: Setup, name: str, start: Callable[[Setup], Expert], by_compute: bool, options: Options, run: int
) -> Trained:
    """Train with the ensemble's recipe; what is trained is only read.

    A run to equal compute goes on from that to equal steps.
    """
    place = Path(f"lr-{options['lr']:g}") / f"seed-{run}"
    folder = setup.output / "trained" / name / place
    settings = _settings(setup, start, by_compute, options, run, folder)
    record = finetune_finished(settings)
    if record is None:
        if by_compute:
            _go_on(settings, setup.output / "trained" / name.removesuffix(COMPUTE) / place / KEPT)
        kept = folder / KEPT if f"{name}{COMPUTE}" in chosen_methods(setup.settings.methods) else None
        record = finetune(
            settings,
            plan_finetune(
                settings, Ensemble.from_experts([start(setup)], aggregator="mean", placement="out")
            ),
            kept,
        )
    return Trained(
        folder,
        folder / FILE,
        record["parameters"],
        record["steps"],
        record["seconds"],
        record["held_out_loss"]["trained"]["value"],
    )


def _go_on(settings: LoraSettings, place: Path) -> None:
    """Let a run that has not begun go on from where a shorter one ended."""
    state = PartialState()
    if state.is_main_process and not Path(settings.output).exists():
        begin_from(settings, place)
    state.wait_for_everyone()


def _settings(
    setup: Setup, start: Callable[[Setup], Expert], by_compute: bool, options: Options, run: int, folder: Path
) -> LoraSettings:
    """The ensemble's own settings, with its rate scaled, and its steps where compute is to be equal."""
    ensemble = setup.training(folder, run)
    shared = {field.name: getattr(ensemble, field.name) for field in dataclasses.fields(LoopSettings)}
    expert = setup.ensemble.experts[0].model
    rank = matching_rank(expert, read_manifest(setup.folder).aggregator["parameters"])
    steps = _equal_steps(setup, rank, ensemble.steps, ensemble.batch_size) if by_compute else ensemble.steps
    source = setup.ranking[0] if start is _best else "+".join(setup.names)
    return LoraSettings(
        **{**shared, "expert": source, "rank": rank, "lr": ensemble.lr * options["lr"], "steps": steps}
    )


@functools.lru_cache(maxsize=1)
def _equal_steps(setup: Setup, rank: int, steps: int, batch_size: int) -> int:
    return equal_compute_steps(steps, setup.ensemble.denoiser, rank, batch_size)


def _sampler(
    setup: Setup,
    start: Callable[[Setup], Expert],
    train: Callable[[Options, int], Trained],
    options: Options,
    run: int,
) -> Sampler:
    """A stock pipeline around the expert with its LoRA in its weights."""
    expert = start(setup)
    fuse_lora(expert.model, train(options, run).file)
    return merged_sampler(setup, expert)


PART = 4  # of the ensemble's own steps, one part further
OBJECTIVES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "mse+reward": {"objective": "mse+reward", "reward_weight": 0.1, "reward_reach": 1.0},
    "reward": {"objective": "reward", "reward_weight": 0.1, "reward_reach": 1.0},
    "mse+draft": {"objective": "mse+draft", "reward_weight": 0.3},
    "draft": {"objective": "draft", "reward_weight": 0.3},
}


def objective_rows(setup: Setup) -> list[MethodRow]:
    """One row an objective.

    The diffusion loss itself is compared with the ensemble, all others with the diffusion loss.
    """
    return [_objective_row(setup, name, changes) for name, changes in OBJECTIVES.items()]


def _objective_row(setup: Setup, name: str, changes: dict[str, Any]) -> MethodRow:
    of = "afa" if name == PLAIN else _name(PLAIN)
    make = functools.partial(_train_objective, setup, name, changes)
    sampler: Callable[..., Any] = functools.partial(trained_sampler, setup, make, ())
    return MethodRow(
        _name(name),
        "ours",
        f"AFA, further by {name}",
        sampler,
        train=make,
        runs=setup.settings.seeds,
        axes={"objective": name},
        of=of,
        cost="ensemble",
    )


def _name(objective: str) -> str:
    return f"afa, objective {objective}"


def _train_objective(setup: Setup, name: str, changes: dict[str, Any], options: Options, run: int) -> Trained:
    """Train further; what is trained is only read."""
    settings = _objective_settings(setup, name, changes, afa_run(setup, {}, run).folder, run)
    if finished(settings) is None:
        assert settings.start is not None
        train(settings, plan(settings, setup.ensemble.sharing(aggregators=settings.start)))
    return read_trained(Path(settings.output))


def _objective_settings(
    setup: Setup, name: str, changes: dict[str, Any], start: Path, run: int
) -> TrainSettings:
    """The ensemble's own recipe, for fewer steps of half the batch and a quarter of the rate.

    Raises UserError if nobody named a reward.
    """
    output = setup.output / "trained" / f"objective-{folder_name(name)}" / f"seed-{run}"
    own = setup.training(output, run)
    steps, sampling = max(1, own.steps // PART), setup.protocol.sampling
    rewarded = {}
    if changes:
        reward = setup.settings.reward or setup.protocol.reward
        if reward is None:
            raise UserError("the study of objectives needs a reward; name one with --reward")
        drawn = max(1, sampling.steps // 2)
        rewarded = {
            "reward": reward,
            "reward_weights": setup.settings.reward_weights,
            "draft_steps": drawn,
            "draft_last": drawn,
        }
        rewarded["draft_guidance"] = sampling.guidance
    return own.further(
        start,
        steps=steps,
        batch_size=max(1, own.batch_size // 2),
        lr=own.lr / PART,
        # the last weights are compared, with those it started from only where they are better
        evaluate_every=steps,
        warm_up=min(own.warm_up, steps // 10),
        ema=min(own.ema, 0.95),
        **rewarded,
        **changes,
    )
