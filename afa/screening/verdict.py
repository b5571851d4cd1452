"""The forecast of the gain from head-room, and the verdict in words.

The forecast rests on sets of experts that were screened and then trained:
`benchmarks/screening.py --calibrate` makes them and writes calibration.json.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np

from afa.pages.advice import ENSEMBLE, MERGE, ONE, for_screening
from afa.pages.numbers import number
from afa.schema import Within, build
from afa.stats import Estimate
from afa.text_files import read_json

CALIBRATION = Path(__file__).with_name("calibration.json")
LEVEL = 0.95


class CalibrationSet(TypedDict):
    """One set of experts in calibration.json.

    world:           far or near
    head_room:       measured by a screening, as a share of the best expert's loss
    afa:             measured gain of trained AFA over the best expert, as a share of its loss
    router:          measured gain of a trained router
    average:         measured gain of the weight average
    averaging_helps: whether the interval of that is above 0
    """

    world: str
    head_room: float
    afa: float
    router: float
    average: float
    averaging_helps: bool


class Calibration(TypedDict):
    """The content of calibration.json."""

    sets: Annotated[list[CalibrationSet], Within(2)]


@dataclass(frozen=True)
class Forecast:
    """A predicted gain.

    value: share by which the loss falls
    low:   lower end of the interval that held 95 % of the calibration sets
    high:  upper end
    sets:  number of calibration sets
    """

    value: float
    low: float
    high: float
    sets: int


@dataclass(frozen=True)
class Fit:
    """A least-squares fit through zero: gain = slope · head-room.

    slope:  of the line
    spread: LEVEL quantile of the absolute errors if each set is predicted from the other sets
    sets:   number of calibration sets
    """

    slope: float
    spread: float
    sets: int

    @classmethod
    def of(cls, head_room: Sequence[float] | np.ndarray, gains: Sequence[float] | np.ndarray) -> "Fit":
        x, y = np.asarray(head_room, np.float64), np.asarray(gains, np.float64)
        each = [_slope(np.delete(x, place), np.delete(y, place)) for place in range(len(x))]
        missed = y - np.asarray(each) * x
        return cls(_slope(x, y), float(np.quantile(np.abs(missed), LEVEL, method="higher")), len(x))

    def __call__(self, head_room: float) -> Forecast:
        value = self.slope * max(head_room, 0.0)
        return Forecast(value, value - self.spread, value + self.spread, self.sets)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / (x * x).sum())


def fit(sets: Sequence[CalibrationSet], averaging_helps: bool) -> dict[str, Fit]:
    """Fit the gain of training to head-room, by method: afa, router.

    averaging_helps: use the sets whose weight average is better than their best expert; there the gain beyond
                     the average is fitted to the head-room beyond it, for other sets gain to head-room
    """
    alike = [one for one in sets if one["averaging_helps"] == averaging_helps]
    taken = np.array([one["average"] if averaging_helps else 0.0 for one in alike])
    room = np.array([one["head_room"] for one in alike]) - taken
    return {
        "afa": Fit.of(room, np.array([one["afa"] for one in alike]) - taken),
        "router": Fit.of(room, np.array([one["router"] for one in alike]) - taken),
    }


@functools.cache
def fits(averaging_helps: bool) -> dict[str, Fit]:
    """Return the fits to calibration.json; see fit()."""
    return fit(build(Calibration, read_json(CALIBRATION), CALIBRATION)["sets"], averaging_helps)


def forecast(method: str, room: float, average: Estimate | None) -> Forecast:
    """Predict what a method, afa or router, gains over the best expert by training.

    room:    head-room, as a share of the best expert's loss
    average: measured gain of the weight average; None: not known
    What experts do differently at random, an average takes, too. So where averaging helps, head-room is
    hardly learnable beyond it.
    """
    if average is None or average.low <= 0:
        return fits(False)[method](room)
    beyond = fits(True)[method](room - average.value)
    value, low, high = (part + average.value for part in (beyond.value, beyond.low, beyond.high))
    return Forecast(value, low, high, beyond.sets)


def over(gain: Forecast, other: float) -> Forecast:
    """Convert a gain over the best expert to one over a method whose own gain over that expert is `other`."""
    value, low, high = (1 - (1 - part) / (1 - other) for part in (gain.value, gain.low, gain.high))
    return Forecast(value, low, high, gain.sets)


WORTH = 0.01  # a smaller gain is not worth a second model in memory


@dataclass(frozen=True)
class Evidence:
    """The measurements that a verdict rests on.

    names:   of the experts, in the order given
    best:    the expert with the lowest loss
    same:    later expert -> earlier expert that it equals up to rounding
    base:    experts that equal the base model
    lost:    expert -> rise of the routed loss without it, as a share
    room:    learnable head-room over the best expert, as a share of its loss
    afa:     forecast gain of AFA over the best expert
    average: measured gain of the weight average over the best expert; None: not known
    order:   the greedy path, the best expert first
    enough:  number of experts of that path whose loss is within WORTH of the best
    near:    later expert -> earlier expert with nearly the same predictions, and their distance in units of
             their errors
    """

    names: Sequence[str]
    best: str
    same: Mapping[str, str]
    base: Sequence[str]
    lost: Mapping[str, Estimate]
    room: Estimate
    afa: Forecast
    average: Estimate | None
    order: Sequence[str]
    enough: int
    near: Mapping[str, tuple[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The advice of a screening.

    action:  ensemble, merge, one or unknown
    experts: names of the experts to use
    dropped: expert -> reason why it is not used
    reasons: sentences
    sure:    whether the intervals, too, lie on the action's side of WORTH
    doubted: those of `dropped` that may add as much as WORTH, as far as the interval says
    """

    action: str
    experts: tuple[str, ...]
    dropped: dict[str, str]
    reasons: tuple[str, ...]
    sure: bool = False
    doubted: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        drop = [name for name in self.dropped if name not in self.doubted]
        return str(for_screening(self.action, self.experts, drop, self.doubted, self.sure, WORTH))


def judge(evidence: Evidence) -> Verdict:
    """Choose the smallest set of experts that is worth its cost, and the cheapest way to use it."""
    dropped = {name: f"it is {other} but for rounding" for name, other in evidence.same.items()}
    bases = [name for name in evidence.base if name not in dropped and name != evidence.best]
    dropped |= dict.fromkeys(bases, "it is the base model under another name, and adds nothing worth a model")
    kept = [name for name in evidence.order[: evidence.enough] if name not in evidence.same]
    for name in evidence.names:
        if name not in kept and name not in dropped:
            dropped[name] = _adds_little(name, evidence)
    dropped = {name: why for name, why in dropped.items() if name not in kept}
    best = f"{evidence.best}, the best expert,"
    reasons = [
        f"Learnable head-room: routing by place would lower the loss of {best} by {share(evidence.room)}."
    ]
    reasons += [
        f"{name} is the base model under another name; it is kept because it adds to the others."
        for name in evidence.base
        if name in kept
    ]
    if evidence.afa.value < WORTH or len(kept) == 1:
        return _without_ensemble(evidence, dropped, reasons)
    doubted = tuple(name for name in dropped if _may_add(name, evidence))
    if evidence.average is not None:
        if (
            evidence.average.excludes_zero
            and evidence.average.low > 0
            and evidence.average.value >= evidence.afa.value - WORTH
        ):
            reasons.append(
                f"The weight average lowers it by {share(evidence.average)}, at the price of one model; "
                f"AFA is expected to lower it by {spread(evidence.afa)}."
            )
            return Verdict(MERGE, tuple(kept), dropped, tuple(reasons), _no_more(evidence), doubted)
        how = "lowers it by" if evidence.average.value >= 0 else "raises it by"
        reasons.append(
            f"The weight average {how} {share(evidence.average, absolute=True)};"
            f" AFA is expected to lower it by {spread(evidence.afa)}."
        )
    else:
        reasons.append(
            "The weight average was not measured. Where it is better than the best expert, as with most"
            " fine-tunes of one base, AFA gains little beyond it, and this forecast is too high:"
            f" {spread(evidence.afa)}."
        )
    return Verdict(ENSEMBLE, tuple(kept), dropped, tuple(reasons), _surely_pays(evidence), doubted)


def _surely_pays(evidence: Evidence) -> bool:
    """Whether head-room is certain, and the forecast's interval is WORTH above what costs one model."""
    average = evidence.average
    if average is None or not evidence.room.excludes_zero:
        return False
    cheap = average.value if average.low > 0 else 0.0
    return evidence.afa.low >= cheap + WORTH


def _no_more(evidence: Evidence) -> bool:
    """Whether the forecast's interval ends below what the best single model has, plus WORTH."""
    average = evidence.average
    return evidence.afa.high < (0.0 if average is None else max(0.0, average.value)) + WORTH


def _may_add(name: str, evidence: Evidence) -> bool:
    """Whether the interval of what an expert adds reaches WORTH; copies add nothing."""
    return name not in evidence.same and name not in evidence.base and evidence.lost[name].high >= WORTH


def _without_ensemble(evidence: Evidence, dropped: dict[str, str], reasons: list[str]) -> Verdict:
    """Return the verdict where an ensemble is not worth it: a merge if that helps, else the best expert."""
    average = evidence.average
    distinct = [name for name in evidence.names if name not in evidence.same]
    if average is not None and average.excludes_zero and average.low > WORTH / 2 and len(distinct) > 1:
        reasons.append(
            f"That is not worth several models; but their weight average lowers it by {share(average)},"
            " at the price of one."
        )
        return Verdict(
            MERGE,
            tuple(distinct),
            {name: why for name, why in dropped.items() if name in evidence.same},
            tuple(reasons),
            _no_more(evidence),
        )
    reasons.append(f"Less than {100 * WORTH:g} % is not worth a second model.")
    rest = {name: why for name, why in dropped.items() if name != evidence.best}
    copies = all(name in evidence.same or name in evidence.base for name in rest)
    return Verdict(ONE, (evidence.best,), rest, tuple(reasons), copies or _no_more(evidence))


def _adds_little(name: str, evidence: Evidence) -> str:
    """Say how much the routed loss changes without an expert, and which expert it resembles."""
    without = f"without it the routed loss changes by {share(evidence.lost[name], signed=True)}"
    for one, (other, distance) in evidence.near.items():
        if name in (one, other):
            twin = other if name == one else one
            apart = f"predictions {distance:.2f} of their errors apart"
            return f"it is a near-duplicate of {twin} ({apart}), and {without}"
    return without


def share(estimate: Estimate, signed: bool = False, absolute: bool = False) -> str:
    """Format a share as per cent: 0.23 [0.2, 0.26], n = 64 -> 23.0 % [20.0, 26.0] (n = 64)."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if absolute and value < 0:
        value, low, high = -value, -high, -low
    shown = [number(100 * part, 1, signed) for part in (value, low, high)]
    around = f" [{shown[1]}, {shown[2]}]" if estimate.has_interval else ""
    return f"{shown[0]} %{around} (n = {estimate.n})"


def spread(gain: Forecast) -> str:
    """Format a forecast with its interval and the number of sets it rests on."""
    shown = [number(100 * part, 0) for part in (gain.value, gain.low, gain.high)]
    return f"{shown[0]} % [{shown[1]}, {shown[2]}] (from {gain.sets} such sets of the embedded worlds)"
