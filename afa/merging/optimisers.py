"""Block weights found by score: what is searched, the journal of points, and two ways through it.

coordinate: one or two stages at a time, everything else held fast. Source: Xerxemi, sdweb-auto-MBW and
auto-MBW-rt.
Deviations: more than two experts (one after the other is given a share against the others as they stand);
where a candidate is as good as what is there, what is there stays.
bayesian: Optuna's tree-structured Parzen estimator over all weights at once. Source: Bergstra et al.,
Algorithms for hyper-parameter optimization, NeurIPS 2011; its use on block weights follows s1dlx's
sd-webui-bayesian-merger.
"""

import importlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from afa.errors import UserError
from afa.merging.rules import BASE
from afa.schema import Score, build
from afa.text_files import parse_json, read_text, split_lines

Scores = list[float]  # one an image
Weights = dict[str, tuple[float, ...]]  # stage -> one weight an expert


@dataclass(frozen=True)
class Space:
    """stages: of the model, in order, `base` not among them. experts: how many."""

    stages: tuple[str, ...]
    experts: int

    @property
    def places(self) -> tuple[str, ...]:
        """Everything that has weights of its own, in the order of the search: base and a U-Net's middle
        first."""
        first = (BASE, *(stage for stage in self.stages if stage == "M00"))
        return (*first, *(stage for stage in self.stages if stage not in first))

    def corner(self, expert: int) -> Weights:
        """One expert alone."""
        return dict.fromkeys(self.places, tuple(float(index == expert) for index in range(self.experts)))

    def middle(self) -> Weights:
        """Equal weights."""
        return dict.fromkeys(self.places, (1 / self.experts,) * self.experts)


def moved(weights: Weights, places: Sequence[str], expert: int, share: float) -> Weights:
    """Give an expert a share at some places. The others keep their proportions, or get equal ones."""
    changed = dict(weights)
    for place in places:
        row = weights[place]
        rest = sum(row) - row[expert]
        others = [
            (value / rest if rest > 0 else 1 / (len(row) - 1)) if index != expert else 0.0
            for index, value in enumerate(row)
        ]
        changed[place] = tuple(
            share if index == expert else (1 - share) * value for index, value in enumerate(others)
        )
    return changed


def key(weights: Mapping[str, Sequence[float]]) -> str:
    """What a point is remembered by: its numbers to six digits."""
    return ";".join(
        f"{place}:{','.join(f'{value:.6f}' for value in row)}" for place, row in sorted(weights.items())
    )


# ---- points that were evaluated ---------------------------------------------------------------------------


class Point(TypedDict):
    """A line of the journal: the weights of every expert at a stage, and a score an image."""

    weights: dict[str, tuple[float, ...]]
    scores: list[Score]


Objective = Callable[[Weights], Scores]


class Journal:
    """Evaluates points once. Each is a line on disk before the next is begun, so a search resumes.

    file: JSON lines; None keeps them in memory only
    """

    def __init__(self, file: Path | None, objective: Objective) -> None:
        self.file, self.objective = file, objective
        self.points: list[tuple[Weights, Scores]] = _read(file) if file is not None else []
        self._known = {key(weights): scores for weights, scores in self.points}

    def __call__(self, weights: Weights) -> Scores:
        """The scores of a point, computed if it is new."""
        name = key(weights)
        if name not in self._known:
            scores = [float(value) for value in self.objective(weights)]
            self._known[name] = scores
            self.points.append((weights, scores))
            self._append(weights, scores)
        return self._known[name]

    def _append(self, weights: Weights, scores: Scores) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torn = (
            self.file.exists() and not self.file.read_bytes().endswith(b"\n") and self.file.stat().st_size > 0
        )
        with self.file.open("a") as stream:
            stream.write(("\n" if torn else "") + json.dumps({"weights": weights, "scores": scores}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _read(file: Path) -> list[tuple[Weights, Scores]]:
    """All whole lines; one that a crash tore is evaluated again.

    Raises UserError for a whole one that is no point.
    """
    points: list[tuple[Weights, Scores]] = []
    for number, line in enumerate(split_lines(read_text(file)) if file.exists() else [], 1):
        where = f"{file}, line {number}"
        try:
            found = parse_json(line, where, nan=True)
        except UserError:
            continue
        point = build(Point, found, where)
        points.append((point["weights"], point["scores"]))
    return points


# ---- how the scores of several images become one number ---------------------------------------------------


def arithmetic(scores: Sequence[float]) -> float:
    """The mean."""
    return math.fsum(scores) / len(scores)


def geometric(scores: Sequence[float]) -> float:
    """The mean of the logarithms, after shifting scores above zero: a bad image weighs more."""
    shift = _above_zero(scores)
    return math.exp(math.fsum(math.log(score + shift) for score in scores) / len(scores)) - shift


def harmonic(scores: Sequence[float]) -> float:
    """The reciprocal of the mean reciprocal, after shifting scores above zero: a bad image weighs most."""
    shift = _above_zero(scores)
    return len(scores) / math.fsum(1 / (score + shift) for score in scores) - shift


SHIFT = 4.0  # ImageReward lies between about -2.5 and 2.5


def _above_zero(scores: Sequence[float]) -> float:
    """The same shift for all sets of scores, unless one lies lower still."""
    return max(SHIFT, 1e-3 - min(scores))


MEANS: dict[str, Callable[[Sequence[float]], float]] = {
    "arithmetic": arithmetic,
    "geometric": geometric,
    "harmonic": harmonic,
}


# ---- stage by stage ---------------------------------------------------------------------------------------

GRID = tuple(step / 10 for step in range(11))
Line = Callable[[float], float]  # a share -> its score


def linear(score: Line) -> float:
    """The best of 0, 0.1 … 1."""
    return max(GRID, key=score)


def binary(score: Line) -> float:
    """Halve the interval from 0 to 1 four times, towards the better end: -> the best share seen."""
    low, high = 0.0, 1.0
    seen = {low: score(low), high: score(high)}
    for _ in range(4):
        middle = (low + high) / 2
        seen[middle] = score(middle)
        low, high = (low, middle) if seen[low] > seen[high] else (middle, high)
    return max(seen, key=lambda share: seen[share])


def binary_mid(score: Line) -> float:
    """Begin in the middle and step to the better side, with steps of 1/4, 1/8, 1/16; the best share seen."""
    centre, step = 0.5, 0.25
    seen = {centre: score(centre), 0.0: score(0.0), 1.0: score(1.0)}
    for _ in range(3):
        for share in (centre - step, centre + step):
            seen[share] = score(share)
        centre = max((centre - step, centre, centre + step), key=lambda share: seen[share])
        step /= 2
    return max(seen, key=lambda share: seen[share])


LINES: dict[str, Callable[[Line], float]] = {"linear": linear, "binary": binary, "binary_mid": binary_mid}


def coordinate_search(
    space: Space,
    journal: Journal,
    *,
    passes: int = 1,
    line: str = "linear",
    grouping: int = 1,
    means: Sequence[str] = ("arithmetic",),
) -> Weights:
    """Begin with the first expert alone and improve place after place: -> the best weights.

    line:     how one share is found, of LINES
    grouping: neighbouring stages of one kind changed together, 1 or 2
    means:    of MEANS, one a pass; the last serves all later passes
    Every point goes through the journal.
    """
    best = space.corner(0)
    for number in range(passes):
        mean = MEANS[means[min(number, len(means) - 1)]]
        for places in groups(space, grouping):
            for expert in range(1, space.experts):
                best = _improve(best, places, expert, journal, mean, LINES[line])
    return best


def _improve(
    best: Weights,
    places: Sequence[str],
    expert: int,
    journal: Journal,
    mean: Callable[[Sequence[float]], float],
    line: Callable[[Line], float],
) -> Weights:
    """The best share of one expert at some places; what is there stays unless something is better."""

    def score(share: float) -> float:
        return mean(journal(moved(best, places, expert, share)))

    share = line(score)
    return moved(best, places, expert, share) if score(share) > mean(journal(best)) else best


def groups(space: Space, grouping: int) -> list[tuple[str, ...]]:
    """All places in their order; the stages of one kind (IN, OUT; J, D, S) one by one or two by two."""
    kinds = [
        list(places)
        for _, places in itertools.groupby(space.places, key=lambda place: place.rstrip("0123456789"))
    ]
    return [
        tuple(kind[start : start + grouping]) for kind in kinds for start in range(0, len(kind), grouping)
    ]


# ---- all weights at once ----------------------------------------------------------------------------------


def bayesian_search(space: Space, journal: Journal, *, trials: int, seed: int = 0) -> Weights:
    """Try `trials` points: equal weights, every expert alone, then what the estimator proposes.

    Two experts have one number a place, the second's share; more have a number each, divided by their sum.
    What the journal knows is not evaluated again, and a resumed search proposes what an uninterrupted one
    would have.
    Raises UserError if Optuna is not installed.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in _names(space)}
    for number, weights in enumerate(_first(space)[:trials]):
        _tell(study, optuna, distributions, _numbers(weights, space), arithmetic(journal(weights)), number)
    for number in range(len(study.trials), trials):
        # A sampler of its own for every trial: it draws by seed and number, whatever ran before.
        trial_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(
            seed=trial_seed, multivariate=True, n_startup_trials=min(10, trials // 2)
        )
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
        raise UserError(
            "the bayesian search needs Optuna, which is not installed;"
            " pip install 'afa[search]', or search by coordinate"
        ) from None


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
    rows = {
        place: [numbers[f"{place} {expert}"] for expert in range(space.experts)] for place in space.places
    }
    return {place: _divided(row) for place, row in rows.items()}


def _divided(row: Sequence[float]) -> tuple[float, ...]:
    total = sum(row)
    return tuple(value / total for value in row) if total > 0 else (1 / len(row),) * len(row)


def _tell(
    study: Any,
    optuna: Any,
    distributions: dict[str, Any],
    numbers: dict[str, float],
    value: float,
    number: int,
) -> None:
    study.add_trial(
        optuna.trial.create_trial(
            params=numbers, distributions=distributions, value=value, user_attrs={"number": number}
        )
    )
