"""The study of objectives: the ensemble trained further by each, for as many steps, from the same weights at every seed."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.evaluation.rows import Options, Row, Trained
from afa.evaluation.setup import Setup
from afa.evaluation.trained import afa_run, folder_name, read_trained, trained_sampler
from afa.training.run import finished, plan, train
from afa.training.settings import TrainSettings

PART = 4  # of the ensemble's own steps, one part further
PLAIN = "mse"
OBJECTIVES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "mse+reward": {"objective": "mse+reward", "reward_weight": 0.1, "reward_reach": 1.0},
    "reward": {"objective": "reward", "reward_weight": 0.1, "reward_reach": 1.0},
    "mse+draft": {"objective": "mse+draft", "reward_weight": 0.3},
    "draft": {"objective": "draft", "reward_weight": 0.3},
}


def objective_rows(setup: Setup) -> list[Row]:
    """One row an objective; the diffusion loss itself is compared with the ensemble, all others with the diffusion loss."""
    return [_row(setup, name, changes) for name, changes in OBJECTIVES.items()]


def _row(setup: Setup, name: str, changes: dict[str, Any]) -> Row:
    of = "afa" if name == PLAIN else _name(PLAIN)
    make = functools.partial(_train, setup, name, changes)
    sampler: Callable[..., Any] = functools.partial(trained_sampler, setup, make, ())
    return Row(_name(name), "ours", f"AFA, further by {name}", sampler, train=make, runs=setup.settings.seeds, axes={"objective": name}, of=of)


def _name(objective: str) -> str:
    return f"afa, objective {objective}"


def _train(setup: Setup, name: str, changes: dict[str, Any], options: Options, run: int) -> Trained:
    """Train further; what is trained is only read."""
    settings = _settings(setup, name, changes, afa_run(setup, {}, run).folder, run)
    if finished(settings) is None:
        assert settings.start is not None
        train(settings, plan(settings, setup.ensemble.sharing(aggregators=settings.start)))
    return read_trained(Path(settings.output))


def _settings(setup: Setup, name: str, changes: dict[str, Any], start: Path, run: int) -> TrainSettings:
    """The ensemble's own recipe, for fewer steps of half the batch and a quarter of the rate. Raises UserError if nobody named a reward."""
    output = setup.output / "trained" / f"objective-{folder_name(name)}" / f"seed-{run}"
    own = setup.training(output, run)
    steps, sampling = max(1, own.steps // PART), setup.protocol.sampling
    rewarded = {}
    if changes:
        reward = setup.settings.reward or setup.protocol.reward
        if reward is None:
            raise UserError("the study of objectives needs a reward; name one with --reward")
        drawn = max(1, sampling.steps // 2)
        rewarded = {"reward": reward, "reward_weights": setup.settings.reward_weights, "draft_steps": drawn, "draft_last": drawn}
        rewarded["draft_guidance"] = sampling.guidance
    return own.further(
        start,
        steps=steps,
        batch_size=max(1, own.batch_size // 2),
        lr=own.lr / PART,
        evaluate_every=steps,  # the last weights are compared, with those it started from only where they are better
        warm_up=min(own.warm_up, steps // 10),
        ema=min(own.ema, 0.95),
        **rewarded,
        **changes,
    )
