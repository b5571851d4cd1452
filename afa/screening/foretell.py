"""From head-room to what training would gain, by what it gained for expert sets that were screened and trained.

The sets and how they were made: benchmarks/screening.py, whose --calibrate writes calibration.json.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np

from afa.schema import Within, build
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
    return {"afa": Fit.of(room, [point["afa"] for point in points]), "router": Fit.of(room, [point["router"] for point in points])}


def over(gain: Foretold, other: float) -> Foretold:
    """A gain over the best expert as one over something whose own gain over the best expert is known."""
    value, low, high = (1 - (1 - part) / (1 - other) for part in (gain.value, gain.low, gain.high))
    return Foretold(value, low, high, gain.sets)
