"""Rows of ensembles that are trained first: the router, the ensemble itself, studies of its parts."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from afa.aggregators.registry import find_aggregator
from afa.checkpoint.manifest import AGGREGATORS, read_manifest
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.placement import fused_stages
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.rows import SHARED, MethodRow, Options, Train, Trained
from afa.evaluation.setup import Setup
from afa.sampling.sample import Sampler, sample
from afa.training.choices import chosen
from afa.training.objective_registry import PLAIN
from afa.training.run import finished, plan, train

# objectives that the study trains the ensemble further by -> their options
FURTHER: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "mse+reward": {"objective": "mse+reward", "reward_weight": 0.1, "reward_reach": 1.0},
    "reward": {"objective": "reward", "reward_weight": 0.1, "reward_reach": 1.0},
    "mse+draft": {"objective": "mse+draft", "reward_weight": 0.3},
    "draft": {"objective": "draft", "reward_weight": 0.3},
}
PART = 4  # the study of objectives goes on for one part of the ensemble's own steps
# title -> changes to the ensemble's own recipe; a row that changes nothing is left out
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
    """Return the rows of the prediction router, of the ensemble, and of it with shared weights."""
    router = functools.partial(_train, setup, "prediction_router", {"placement": "out"})
    afa, shared = functools.partial(afa_run, setup), "AFA, conditional weights on both branches"
    return [
        _row(setup, "prediction_router", "prediction router", router, group="control", cost="all experts"),
        _row(setup, "afa", "AFA", afa),
        _row(setup, SHARED, shared, afa, shared=True, guided=True),
    ]


def ablation_rows(setup: Setup) -> list[MethodRow]:
    """Return rows that are trained by the ensemble's recipe with one change."""
    denoiser = setup.ensemble.denoiser
    recorded = setup.training(setup.output, 0, placement=denoiser.placement)  # the family's by default
    rows = []
    for title, changes in ABLATIONS.items():
        own = {name: getattr(recorded, name) for name in changes}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        if own != changes and _differs(denoiser, changes):
            make = functools.partial(_train, setup, folder_name(title), changes)
            rows.append(_row(setup, f"afa, {title}", title, make, axes={"variant": title}, of="afa"))
    return rows


def _differs(denoiser: EnsembleDenoiser, changes: Mapping[str, Any]) -> bool:
    """Return whether a change makes a difference for this ensemble.

    It makes none if its aggregators lack the option, if the family's blocks do not change text tokens, or if
    the placement gives the same stages.
    """
    options = (field.name for field in fields(find_aggregator(denoiser.recipe.kind).options))
    if not changes.keys() <= {"aggregator", "placement", "text_stream", *options}:
        return False
    if "text_stream" in changes:
        return denoiser.interface.changes_text
    return "placement" not in changes or fused_stages(changes["placement"], denoiser.stages) != denoiser.fused


def expert_rows(setup: Setup) -> list[MethodRow]:
    """Return rows of the two best experts, of the three best …; the ensemble has all of them."""
    specs = dict(zip(setup.names, setup.expert_specs(), strict=True))
    rows = []
    for count in range(2, len(setup.names)):
        chosen = [name for name in setup.names if name in setup.ranking[:count]]
        changes = {"experts": [specs[name] for name in chosen], "vae": None}
        make = functools.partial(_train, setup, f"experts-{'-'.join(chosen)}", changes)
        name, title = f"afa, {count} experts", f"AFA of {', '.join(chosen)}"
        rows.append(_row(setup, name, title, make, axes={"experts": count}, of="afa", experts=chosen))
    return rows


def folder_name(title: str) -> str:
    """Return the name of a title's folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in title).strip("-")


def _row(
    setup: Setup,
    name: str,
    title: str,
    train: Train,
    *,
    experts: Sequence[str] = (),
    shared: bool = False,
    **more: Any,
) -> MethodRow:
    """Return a row of ensembles that are trained first.

    experts: of the ensembles; empty: all
    shared:  both predictions of guidance share their weights
    """
    sampler = functools.partial(_sampler, setup, train, experts, shared)
    given = {"group": "ours", "cost": "ensemble", "runs": setup.settings.seeds, **more}
    return MethodRow(name=name, title=title, sampler=sampler, train=train, **given)


def _sampler(
    setup: Setup, train: Train, experts: Sequence[str], shared: bool, options: Options, run: int
) -> Sampler:
    """Return a stock pipeline around the trained ensemble; experts in memory are shared."""
    if shared:
        setup.check_guided()
    folder = train(options, run).folder
    if experts:
        chosen = [setup.expert(name) for name in experts]
        ensemble = Ensemble.from_experts(chosen, aggregators=folder)
    else:
        ensemble = setup.ensemble.sharing(aggregators=folder)
    ensemble.aggregators.to(setup.dtype)
    if shared:
        ensemble.denoiser.share_guidance_weights = True
    return functools.partial(sample, setup.pipeline(ensemble))


def afa_run(setup: Setup, options: Options, run: int) -> Trained:
    """Return the given ensemble for run 0, and for later runs one that is trained with another seed."""
    return read_trained(setup.folder) if run == 0 else _train(setup, "afa", {}, options, run)


def _train(setup: Setup, name: str, changes: dict[str, Any], options: Options, run: int) -> Trained:
    """Train by the ensemble's recipe with some changes, or read what was trained before.

    Experts that are in memory already are shared.
    """
    settings = setup.training(setup.output / "trained" / name / f"seed-{run}", run, **changes)
    if finished(settings) is None:
        shared = None
        own = settings.experts == setup.expert_specs() and settings.dtype == setup.settings.dtype
        if own and settings.store is None:
            settings = chosen(settings, 0, setup.ensemble.experts)
            shared = setup.ensemble.sharing(
                settings.aggregator,
                settings.placement,
                attention_up_to=settings.attention_up_to,
                text_stream=settings.text_stream,
                **settings.aggregator_options(),
            )
        train(settings, plan(settings, shared), keep=False)
    return read_trained(Path(settings.output))


def read_trained(folder: Path) -> Trained:
    """Read what training left in a folder."""
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


def objective_rows(setup: Setup) -> list[MethodRow]:
    """Return one row for each objective.

    The diffusion loss itself is compared with the ensemble, all others with the diffusion loss.
    """
    names = {objective: f"afa, objective {objective}" for objective in FURTHER}
    return [
        _row(
            setup,
            names[objective],
            f"AFA, further by {objective}",
            functools.partial(_train_further, setup, objective),
            axes={"objective": objective},
            of="afa" if objective == PLAIN else names[PLAIN],
        )
        for objective in FURTHER
    ]


def _train_further(setup: Setup, objective: str, options: Options, run: int) -> Trained:
    """Train the ensemble further by an objective, or read what was trained before.

    By the ensemble's own recipe, for fewer steps of half the batch and a quarter of the rate. Raises
    UserError if the objective needs a reward and none is given.
    """
    output = setup.output / "trained" / f"objective-{folder_name(objective)}" / f"seed-{run}"
    own, start = setup.training(output, run), afa_run(setup, {}, run).folder
    steps, sampling = max(1, own.steps // PART), setup.protocol.sampling
    changes = FURTHER[objective]
    if changes:
        reward = setup.settings.reward or setup.protocol.reward
        if reward is None:
            raise UserError("the study of objectives needs a reward; name one with --reward")
        changes = {
            **changes,
            "reward": reward,
            "reward_weights": setup.settings.reward_weights,
            "draft_steps": max(1, sampling.steps // 2),
            "draft_last": max(1, sampling.steps // 2),
            "draft_guidance": sampling.guidance,
        }
    settings = own.further(
        start,
        steps=steps,
        batch_size=max(1, own.batch_size // 2),
        lr=own.lr / PART,
        # the last weights are compared, with those it started from only where they are better
        evaluate_every=steps,
        warm_up=min(own.warm_up, steps // 10),
        ema=min(own.ema, 0.95),
        **changes,
    )
    if finished(settings) is None:
        train(settings, plan(settings, setup.ensemble.sharing(aggregators=start)), keep=False)
    return read_trained(output)
