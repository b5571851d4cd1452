"""A number is an estimate: a value, its 95 % interval and how many items it rests on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over n items with its 95 % bootstrap interval [low, high]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero: a difference that is more than chance."""
        return self.low > 0 or self.high < 0


def estimate(values: NDArray[np.floating], seed: int = 0) -> Estimate:
    """The mean of one value per item (n,), with the percentile bootstrap over items. Raises ValueError for no items.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"an estimate needs one value per item, got shape {values.shape}")
    means = values[_resamples(len(values), seed)].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def difference(values: NDArray[np.floating], others: NDArray[np.floating], seed: int = 0) -> Estimate:
    """values - others, paired item by item: what both share (a hard prompt) cancels. Raises ValueError if they do not pair."""
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if values.shape != others.shape:
        raise ValueError(f"paired values must be of the same items, got shapes {values.shape} and {others.shape}")
    return estimate(values - others, seed)


def _resamples(n: int, seed: int) -> NDArray[np.int64]:
    """(RESAMPLES, n) indices of items drawn with replacement."""
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
