"""How the scores of several images become one number."""

import math
from collections.abc import Callable, Sequence


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


MEANS: dict[str, Callable[[Sequence[float]], float]] = {"arithmetic": arithmetic, "geometric": geometric, "harmonic": harmonic}
