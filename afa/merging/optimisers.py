"""Block weights found by score: what is searched, the journal of points, and two ways through it.

coordinate: one or two stages at a time, everything else held fast. Source: Xerxemi, sdweb-auto-MBW and
auto-MBW-rt.
Deviations: more than two experts (one after the other is given a share against the others as they stand);
where a candidate is as good as what is there, what is there stays.
bayesian: Optuna's tree-structured Parzen estimator over all weights at once. Source: Bergstra et al.,
Algorithms for hyper-parameter optimization, NeurIPS 2011; its use on block weights follows s1dlx's
sd-webui-bayesian-merger.
"""

import functools
import importlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean, harmonic_mean
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
        """All that has weights of its own, as the search takes it: base and a U-Net's middle first."""
        return (BASE, *sorted(self.stages, key=lambda stage: stage != "M00"))

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
        others = [value / rest if rest > 0 else 1 / (len(row) - 1) for value in row]
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


class JournalLine(TypedDict):
    """A line of the journal: the weights of every expert at a stage, and a score an image."""

    weights: dict[str, tuple[float, ...]]
    scores: list[Score]


Objective = Callable[[Weights], Scores]


class Journal:
    """Evaluates points once. Each is a line on disk before the next is begun, so a search resumes.

    file: JSON lines; None keeps them in memory only
    Raises UserError for a whole line that is no point; one that a crash tore is evaluated again.
    """

    def __init__(self, file: Path | None, objective: Objective) -> None:
        self.file, self.objective = file, objective
        self._known: dict[str, tuple[Weights, Scores]] = {}
        for number, line in enumerate(split_lines(read_text(file)) if file and file.exists() else [], 1):
            where = f"{file}, line {number}"
            try:
                found = parse_json(line, where, nan=True)
            except UserError:
                continue
            point = build(JournalLine, found, where)
            self._known[key(point["weights"])] = point["weights"], point["scores"]

    @property
    def points(self) -> list[tuple[Weights, Scores]]:
        """All that are known, in their order."""
        return list(self._known.values())

    def __call__(self, weights: Weights) -> Scores:
        """The scores of a point, computed if it is new."""
        name = key(weights)
        if name not in self._known:
            scores = [float(value) for value in self.objective(weights)]
            self._known[name] = weights, scores
            if self.file is not None:
                self._append(self.file, json.dumps({"weights": weights, "scores": scores}))
        return self._known[name][1]

    @staticmethod
    def _append(file: Path, line: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
        with file.open("a") as stream:
            stream.write(("\n" if torn else "") + line + "\n")
            stream.flush()
            os.fsync(stream.fileno())


# ---- how the scores of several images become one number ---------------------------------------------------

Mean = Callable[[Sequence[float]], float]
SHIFT = 4.0  # makes scores positive: ImageReward lies between about -2.5 and 2.5


def geometric(scores: Sequence[float]) -> float:
    """The mean of the logarithms: a bad image weighs more."""
    return _shifted(geometric_mean, scores)


def harmonic(scores: Sequence[float]) -> float:
    """The reciprocal of the mean reciprocal: a bad image weighs most."""
    return _shifted(harmonic_mean, scores)


def _shifted(mean: Mean, scores: Sequence[float]) -> float:
    """A mean of scores above zero: all are shifted by the same, unless one lies lower still."""
    shift = max(SHIFT, 1e-3 - min(scores))
    return mean([score + shift for score in scores]) - shift


MEANS: dict[str, Mean] = {
    "arithmetic": fmean,
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
    Every point goes through the journal. What is there stays unless something is better.
    """
    best = space.corner(0)
    steps = itertools.product(range(passes), groups(space, grouping), range(1, space.experts))
    for number, places, expert in steps:
        mean = MEANS[means[min(number, len(means) - 1)]]
        with_share = functools.partial(moved, best, places, expert)
        score = _scores_on_line(with_share, journal, mean)
        share = LINES[line](score)
        if score(share) > mean(journal(best)):
            best = with_share(share)
    return best


def _scores_on_line(with_share: Callable[[float], Weights], journal: Journal, mean: Mean) -> Line:
    return lambda share: mean(journal(with_share(share)))


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
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError:
        raise UserError(
            "the bayesian search needs Optuna, which is not installed;"
            " pip install 'afa[search]', or search by coordinate"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    experts = [1] if space.experts == 2 else range(space.experts)
    names = {f"{place} {expert}": (place, expert) for place in space.places for expert in experts}
    distributions = dict.fromkeys(names, optuna.distributions.FloatDistribution(0.0, 1.0))
    for weights in (space.middle(), *map(space.corner, range(space.experts))):
        study.enqueue_trial({name: weights[place][expert] for name, (place, expert) in names.items()})
    for number in range(trials):
        # A sampler of its own for every trial: it draws by seed and number, whatever ran before.
        trial_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(
            seed=trial_seed, multivariate=True, n_startup_trials=min(10, trials // 2)
        )
        trial = study.ask(distributions)
        point = {place: _row([trial.params[f"{place} {e}"] for e in experts]) for place in space.places}
        study.tell(trial, fmean(journal(point)))
    return best_point(journal)


def best_point(journal: Journal) -> Weights:
    """The point with the highest mean; of equals the first."""
    weights, _ = max(journal.points, key=lambda point: fmean(point[1]))
    return weights


def _row(numbers: Sequence[float]) -> tuple[float, ...]:
    """The optimiser's numbers of a place as weights that sum to 1."""
    if len(numbers) == 1:  # the share of the second of two experts
        return (1 - numbers[0], numbers[0])
    total = sum(numbers)
    return tuple(number / total if total > 0 else 1 / len(numbers) for number in numbers)
