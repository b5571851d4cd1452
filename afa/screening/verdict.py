"""The verdict in words, and the forecast of what AFA would gain.

From head-room to what training would gain, by what it gained for expert sets that were screened and trained.

The sets and how they were made: benchmarks/screening.py, whose --calibrate writes calibration.json.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np

from afa.pages.numbers import number
from afa.schema import Within, build
from afa.stats import Estimate
from afa.text_files import read_json

CALIBRATION = Path(__file__).with_name("calibration.json")
LEVEL = 0.95


class Measured(TypedDict):
    """One set of experts: its head-room, and what training gained over its best expert."""

    head_room: float
    afa: float
    router: float


class Calibration(TypedDict):
    """calibration.json."""

    sets: Annotated[list[Measured], Within(2)]


@dataclass(frozen=True)
class Foretold:
    """A predicted share by which a loss falls, with the interval that held 95 % of the sets it rests on."""

    value: float
    low: float
    high: float
    sets: int


@dataclass(frozen=True)
class Fit:
    """gain = slope · head-room, through zero, by least squares.

    spread: when every set is predicted by the others, LEVEL of them are off by no more than this.
    """

    slope: float
    spread: float
    sets: int

    @classmethod
    def of(cls, head_room: Sequence[float], gains: Sequence[float]) -> "Fit":
        x, y = np.asarray(head_room, np.float64), np.asarray(gains, np.float64)
        each = [_slope(np.delete(x, place), np.delete(y, place)) for place in range(len(x))]
        missed = y - np.asarray(each) * x
        return cls(_slope(x, y), float(np.quantile(np.abs(missed), LEVEL, method="higher")), len(x))

    def __call__(self, head_room: float) -> Foretold:
        value = self.slope * max(head_room, 0.0)
        return Foretold(value, value - self.spread, value + self.spread, self.sets)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / (x * x).sum())


@functools.cache
def fits() -> dict[str, Fit]:
    """By method: afa, router; of the sets in calibration.json."""
    points = build(Calibration, read_json(CALIBRATION), CALIBRATION)["sets"]
    room = [point["head_room"] for point in points]
    return {
        "afa": Fit.of(room, [point["afa"] for point in points]),
        "router": Fit.of(room, [point["router"] for point in points]),
    }


def over(gain: Foretold, other: float) -> Foretold:
    """A gain over the best expert as one over something whose own gain over the best expert is known."""
    value, low, high = (1 - (1 - part) / (1 - other) for part in (gain.value, gain.low, gain.high))
    return Foretold(value, low, high, gain.sets)


WORTH = 0.01  # a loss that is lower by less is not worth a second model in memory
ENSEMBLE, MERGE, ONE, UNKNOWN = "ensemble", "merge", "one", "unknown"


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on. names: in the order given. best: the lowest loss. same: a later expert -> the earlier one it is, but for rounding.

    base: experts that are the base itself. lost: by how much the routed loss rises without an expert, as a share. afa: foretold gain over the best
    expert. average: measured gain of the weight average over the best expert, None if it is not known. order: the greedy path, best expert
    first. enough: how many of it come within WORTH of all. near: a later expert -> the earlier one whose predictions it nearly makes, and how far
    they are apart, in units of their errors.
    """

    names: Sequence[str]
    best: str
    same: Mapping[str, str]
    base: Sequence[str]
    lost: Mapping[str, Estimate]
    room: Estimate
    afa: Foretold
    average: Estimate | None
    order: Sequence[str]
    enough: int
    near: Mapping[str, tuple[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """action: ensemble, merge, one or unknown. experts: to be taken. dropped: expert -> why not. reasons: sentences."""

    action: str
    experts: tuple[str, ...]
    dropped: dict[str, str]
    reasons: tuple[str, ...]

    @property
    def headline(self) -> str:
        names = joined(self.experts)
        if self.action == ENSEMBLE:
            return f"Ensemble {names}."
        if self.action == MERGE:
            return f"Merging will do: {names}."
        return f"One is enough: {names}." if self.action == ONE else "Without images there is no verdict."


def judge(evidence: Evidence) -> Verdict:
    """The smallest set that is worth it, and the cheapest way to use it."""
    dropped = {name: f"it is {other} but for rounding" for name, other in evidence.same.items()}
    bases = [name for name in evidence.base if name not in dropped and name != evidence.best]
    dropped |= dict.fromkeys(bases, "it is the base model under another name, and adds nothing worth a model")
    kept = [name for name in evidence.order[: evidence.enough] if name not in evidence.same]
    for name in evidence.names:
        if name not in kept and name not in dropped:
            dropped[name] = _adds_little(name, evidence)
    dropped = {name: why for name, why in dropped.items() if name not in kept}
    reasons = [
        f"Learnable head-room: routing by place would lower the loss of {evidence.best}, the best expert, by {share(evidence.room)}."
    ]
    reasons += [
        f"{name} is the base model under another name; it is kept because it adds to the others."
        for name in evidence.base
        if name in kept
    ]
    if evidence.afa.value < WORTH or len(kept) == 1:
        return _without_ensemble(evidence, dropped, reasons)
    if evidence.average is not None:
        if (
            evidence.average.excludes_zero
            and evidence.average.low > 0
            and evidence.average.value >= evidence.afa.value - WORTH
        ):
            much = f"as much as AFA is expected to ({spread(evidence.afa)}), at the price of one model"
            reasons.append(f"The weight average lowers it by {share(evidence.average)}, {much}.")
            return Verdict(MERGE, tuple(kept), dropped, tuple(reasons))
        how = "lowers it by" if evidence.average.value >= 0 else "raises it by"
        reasons.append(
            f"The weight average {how} {share(evidence.average, absolute=True)}; AFA is expected to lower it by {spread(evidence.afa)}."
        )
    return Verdict(ENSEMBLE, tuple(kept), dropped, tuple(reasons))


def _without_ensemble(evidence: Evidence, dropped: dict[str, str], reasons: list[str]) -> Verdict:
    """Head-room is not worth it: merge if that helps, else the best alone."""
    average = evidence.average
    distinct = [name for name in evidence.names if name not in evidence.same]
    if average is not None and average.excludes_zero and average.low > WORTH / 2 and len(distinct) > 1:
        reasons.append(
            f"That is not worth several models; but their weight average lowers it by {share(average)}, at the price of one."
        )
        return Verdict(
            MERGE,
            tuple(distinct),
            {name: why for name, why in dropped.items() if name in evidence.same},
            tuple(reasons),
        )
    reasons.append(f"Less than {100 * WORTH:g} % is not worth a second model.")
    rest = {name: why for name, why in dropped.items() if name != evidence.best}
    return Verdict(ONE, (evidence.best,), rest, tuple(reasons))


def _adds_little(name: str, evidence: Evidence) -> str:
    """How much the set would lose without it, and whom it resembles."""
    without = f"without it the routed loss changes by {share(evidence.lost[name], signed=True)}"
    for one, (other, distance) in evidence.near.items():
        if name in (one, other):
            twin = other if name == one else one
            return f"it is a near-duplicate of {twin} (predictions {distance:.2f} of their errors apart), and {without}"
    return without


def share(estimate: Estimate, signed: bool = False, absolute: bool = False) -> str:
    """0.23 [0.2, 0.26], n = 64 -> 23.0 % [20.0, 26.0], n = 64."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if absolute and value < 0:
        value, low, high = -value, -high, -low
    shown = [number(100 * part, 1, signed) for part in (value, low, high)]
    around = f" [{shown[1]}, {shown[2]}]" if estimate.has_interval else ""
    return f"{shown[0]} %{around} (n = {estimate.n})"


def spread(gain: Foretold) -> str:
    """In words, with the interval and what it rests on."""
    shown = [number(100 * part, 0) for part in (gain.value, gain.low, gain.high)]
    return f"{shown[0]} % [{shown[1]}, {shown[2]}] (from {gain.sets} expert sets of the embedded world)"


def joined(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
