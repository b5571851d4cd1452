"""The search by a modern optimiser: Optuna's tree-structured Parzen estimator over all weights at once.

Source: Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011, by way of Optuna; its use on block
weights follows s1dlx's sd-webui-bayesian-merger.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from afa.errors import UserError
from afa.merging.search.journal import Journal
from afa.merging.search.means import arithmetic
from afa.merging.search.space import Space, Weights


def bayesian_search(space: Space, journal: Journal, *, trials: int, seed: int = 0) -> Weights:
    """Try `trials` points: equal weights, every expert alone, then what the estimator proposes. -> the best of all.

    Two experts have one number a place, the second's share; more have a number each, divided by their sum. What the
    journal knows is not evaluated again, and a resumed search proposes what an uninterrupted one would have.
    Raises UserError if Optuna is not installed.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in _names(space)}
    for number, weights in enumerate(_first(space)[:trials]):
        _tell(study, optuna, distributions, _numbers(weights, space), arithmetic(journal(weights)), number)
    for number in range(len(study.trials), trials):
        # A sampler of its own for every trial: what it draws depends on seed and number, not on what ran before.
        trial_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=trial_seed, multivariate=True, n_startup_trials=min(10, trials // 2))
        trial = study.ask(distributions)
        study.tell(trial, arithmetic(journal(_weights(trial.params, space))))
    return best_point(journal)


def best_point(journal: Journal) -> Weights:
    """The point with the highest mean; of equals the first."""
    weights, _ = max(journal.points, key=lambda point: arithmetic(point[1]))
    return weights


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise UserError("the bayesian search needs Optuna, which is not installed; pip install 'afa[search]', or search by coordinate") from None


def _first(space: Space) -> list[Weights]:
    return [space.middle(), *(space.corner(expert) for expert in range(space.experts))]


def _names(space: Space) -> list[str]:
    experts = [1] if space.experts == 2 else range(space.experts)
    return [f"{place} {expert}" for place in space.places for expert in experts]


def _numbers(weights: Weights, space: Space) -> dict[str, float]:
    """Weights as the optimiser has them."""
    places = ((name, *name.rsplit(" ", 1)) for name in _names(space))
    return {name: weights[place][int(expert)] for name, place, expert in places}


def _weights(numbers: dict[str, float], space: Space) -> Weights:
    """The optimiser's numbers as weights."""
    if space.experts == 2:
        return {place: (1 - numbers[f"{place} 1"], numbers[f"{place} 1"]) for place in space.places}
    rows = {place: [numbers[f"{place} {expert}"] for expert in range(space.experts)] for place in space.places}
    return {place: _divided(row) for place, row in rows.items()}


def _divided(row: Sequence[float]) -> tuple[float, ...]:
    total = sum(row)
    return tuple(value / total for value in row) if total > 0 else (1 / len(row),) * len(row)


def _tell(study: Any, optuna: Any, distributions: dict[str, Any], numbers: dict[str, float], value: float, number: int) -> None:
    study.add_trial(optuna.trial.create_trial(params=numbers, distributions=distributions, value=value, user_attrs={"number": number}))


