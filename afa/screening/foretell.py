"""From head-room to what training would gain, by what it gained for expert sets that were screened and trained.

The sets and how they were made: benchmarks/screening.py, whose --calibrate writes calibration.json.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CALIBRATION = Path(__file__).with_name("calibration.json")
LEVEL = 0.95


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
    points = json.loads(CALIBRATION.read_text())["sets"]
    room = [point["head_room"] for point in points]
    return {method: Fit.of(room, [point[method] for point in points]) for method in ("afa", "router")}


def over(gain: Foretold, other: float) -> Foretold:
    """A gain over the best expert as one over something whose own gain over the best expert is known."""
    value, low, high = (1 - (1 - part) / (1 - other) for part in (gain.value, gain.low, gain.high))
    return Foretold(value, low, high, gain.sets)
