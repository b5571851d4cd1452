"""The coordinate search: one or two stages at a time, everything else held fast.

Source: Xerxemi, sdweb-auto-MBW and auto-MBW-rt. Deviations: more than two experts (one after the other is given a share
against the others as they stand); where a candidate is as good as what is there, what is there stays.
"""

import itertools
from collections.abc import Callable, Sequence

from afa.merging.search.journal import Journal
from afa.merging.search.means import MEANS
from afa.merging.search.space import Space, Weights, moved

GRID = tuple(step / 10 for step in range(11))
Line = Callable[[float], float]  # a share -> its score


def linear(score: Line) -> float:
    """The best of 0, 0.1 … 1."""
    return max(GRID, key=score)


def binary(score: Line) -> float:
    """Halve the interval from 0 to 1 four times, keeping the half next to the better end; the best share seen."""
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
    space: Space, journal: Journal, *, passes: int = 1, line: str = "linear", grouping: int = 1, means: Sequence[str] = ("arithmetic",)
) -> Weights:
    """Begin with the first expert alone and improve place after place. -> the best weights by the last pass's mean.

    line: how one share is found, of LINES. grouping: neighbouring stages of one kind changed together, 1 or 2. means: of MEANS, one a
    pass; the last serves all later passes. Every point goes through the journal.
    """
    best = space.corner(0)
    for number in range(passes):
        mean = MEANS[means[min(number, len(means) - 1)]]
        for places in groups(space, grouping):
            for expert in range(1, space.experts):
                best = _improve(best, places, expert, journal, mean, LINES[line])
    return best


def _improve(
    best: Weights, places: Sequence[str], expert: int, journal: Journal, mean: Callable[[Sequence[float]], float], line: Callable[[Line], float]
) -> Weights:
    """The best share of one expert at some places; what is there stays unless something is better."""

    def score(share: float) -> float:
        return mean(journal(moved(best, places, expert, share)))

    share = line(score)
    return moved(best, places, expert, share) if score(share) > mean(journal(best)) else best


def groups(space: Space, grouping: int) -> list[tuple[str, ...]]:
    """All places in their order; the stages of one kind (IN, OUT; J, D, S) one by one or two by two."""
    kinds = [list(places) for _, places in itertools.groupby(space.places, key=lambda place: place.rstrip("0123456789"))]
    return [tuple(kind[start : start + grouping]) for kind in kinds for start in range(0, len(kind), grouping)]
