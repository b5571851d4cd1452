"""Curves over several values of guidance or steps, and how far our curve lies above another.

A curve shows quality (the leading metric of images) against distance to real images (the leading metric of
sets), one point a value. What it reaches at a distance d is the best quality of all values with a distance of
at most d; between the corners of this staircase, straight lines are drawn. Two curves are compared at equal
distance, over the range of distances that both have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from afa.evaluation.columns import Column, Comparison, MethodScores
from afa.evaluation.results import Results, prompts_of
from afa.evaluation.settings import AXES
from afa.significance import holm, set_test
from afa.stats import Array, least_items, prompt_draws, set_estimate


@dataclass(frozen=True)
class FrontierPoint:
    """One value of a curve.

    method: its row in the results
    own:    whether it is the method's own value, that of the main table
    """

    method: str
    value: float
    own: bool


@dataclass(frozen=True)
class Gap:
    """How far our curve lies above another, in units of the metric of images.

    low, high:  the range of distances that both curves have; without one, that of the farther curve
    nearer:     without a common range: the method of which all values are nearer to the real images
    comparison: our mean quality minus the other's over the range. None if the nearer curve is not also the
                better one, since then each is ahead in something; or if they share no training seed
    """

    other: str
    low: float
    high: float
    nearer: str = ""
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Frontier:
    """The curves along one of AXES.

    lines: by method of the main table, ascending values
    gaps:  our method against every other on a curve
    """

    axis: str
    quality: Column
    distance: Column
    lines: Mapping[str, Sequence[FrontierPoint]]
    gaps: Sequence[Gap]


def find_frontiers(
    results: Results, quality: Column | None, distance: Column | None, ours: str | None
) -> list[Frontier]:
    """Return the curves of each setting that has several values.

    quality, distance: the leading metrics of images and of sets; without both there is no curve
    ours:              name of our method
    p-values are corrected over all gaps together (Holm).
    """
    if quality is None or distance is None:
        return []
    found = []
    for axis in AXES:
        lines = _lines(results, axis, quality, distance)
        if lines:
            others = [name for name in lines if name != ours] if ours in lines else []
            prompts = prompts_of(results.items)
            gaps = [_gap((str(ours), name), lines, quality, distance, prompts) for name in others]
            found.append(Frontier(axis, quality, distance, lines, gaps))
    return _corrected(found)


def _lines(results: Results, axis: str, quality: Column, distance: Column) -> dict[str, list[FrontierPoint]]:
    """Return the points by method, of those that were drawn at other values than their own."""
    known = quality.values.keys() & distance.values.keys()
    lines: dict[str, list[FrontierPoint]] = {}
    for method in results.methods:
        if axis in method.axes and axis in results.own.get(method.of, {}) and method.name in known:
            lines.setdefault(method.of, []).append(FrontierPoint(method.name, method.axes[axis], False))
    for name, points in lines.items():
        if name in known:
            points.append(FrontierPoint(name, results.own[name][axis], True))
        points.sort(key=lambda point: point.value)
    return lines


def _gap(
    pair: tuple[str, str],
    lines: Mapping[str, Sequence[FrontierPoint]],
    quality: Column,
    distance: Column,
    prompts: Sequence[int],
) -> Gap:
    """Compare two curves. prompts: of each image"""
    ours, other = (
        [(quality.samples[point.method], distance.samples[point.method]) for point in lines[name]]
        for name in pair
    )
    points = [*ours, *other]
    trained = [sample for both in points for sample in both if sample.trained]
    seeds = sorted(set.intersection(*(set(sample.seeds) for sample in trained))) if trained else [0]
    if not seeds:
        return Gap(pair[1], np.nan, np.nan)
    signs = 1 if quality.note.higher_is_better else -1, -1 if distance.note.higher_is_better else 1
    weights = _weights(max(prompts) + 1, min(len(both[1].replicates[0]) for both in points))
    one, two = (_Resampled.make(some, seeds, weights, signs) for some in (ours, other))
    (low, high), nearer = _range(one, two)
    n = min(both[0].prompts for both in points)
    values, replicates = one.minus(two, low, high)
    p = set_test(values, replicates, n)
    ends = sorted((float(signs[1] * low), float(signs[1] * high)))
    gap = Gap(pair[1], ends[0], ends[1], pair[nearer < 0] if nearer else "")
    if nearer * values.mean() < 0:
        return gap
    if nearer:
        p = max(p, set_test(*(one.ahead(two) if nearer > 0 else two.ahead(one)), n))
    difference = set_estimate(signs[0] * values, signs[0] * replicates, n)
    shared = tuple(seeds) if trained else ()
    by_seed = tuple(float(signs[0] * value) for value in values) if shared else ()
    higher = quality.note.higher_is_better
    found = Comparison(*pair, difference, higher, p, prompts=n, seeds=shared, by_seed=by_seed)
    return replace(gap, comparison=found)


def _range(one: "_Resampled", two: "_Resampled") -> tuple[tuple[float, float], int]:
    """Return the range in which curves are compared, and which is nearer if none is common: 1 or -1."""
    (first, second), (third, fourth) = one.ends(), two.ends()
    if second < third:
        return (third, fourth), 1
    if fourth < first:
        return (first, second), -1
    return (max(first, third), min(second, fourth)), 0


def _weights(prompts: int, resamples: int) -> NDArray[np.int64]:
    """Return how often each resample takes each prompt, (resamples, prompts), as scores of sets have them."""
    return np.stack([np.bincount(draw, minlength=prompts) for draw in prompt_draws(prompts, resamples)])


@dataclass(frozen=True)
class _Resampled:
    """The points of a curve, the better the higher its quality and the lower its distance.

    qualities, distances: (points, runs)
    drawn_qualities, drawn_distances: (points, runs, resamples) of resampled prompts
    """

    qualities: Array
    distances: Array
    drawn_qualities: Array
    drawn_distances: Array

    @classmethod
    def make(
        cls,
        points: Sequence[tuple[MethodScores, MethodScores]],
        seeds: Sequence[int],
        weights: NDArray[np.int64],
        signs: tuple[int, int],
    ) -> "_Resampled":
        """Resample the prompts of both metrics together.

        A distance between sets grows when images are drawn twice; only the spread of its replicates is used.
        """
        scores = signs[0] * np.stack([quality.of_seeds(seeds).scores for quality, _ in points])
        sets = [distance.of_seeds(seeds) for _, distance in points]
        distances = signs[1] * np.stack([one.scores for one in sets])
        drawn = signs[1] * np.stack([one.replicates[:, : len(weights)] for one in sets])
        judged = weights[:, : scores.shape[2]].astype(np.float64)  # a metric may judge the first prompts only
        judged /= np.maximum(judged.sum(1, keepdims=True), 1)
        spread = drawn - drawn.mean(2, keepdims=True)
        return cls(scores.mean(2), distances, scores @ judged.T, distances[..., None] + spread)

    def ends(self) -> tuple[float, float]:
        """Return the smallest and the largest distance of its points."""
        means = self.distances.mean(1)
        return float(means.min()), float(means.max())

    def ahead(self, other: "_Resampled") -> tuple[Array, Array]:
        """Return how much nearer its best point is than all of another curve, as minus() does."""
        best = self.qualities.mean(1).argmax()
        return (
            other.distances.min(0) - self.distances[best],
            other.drawn_distances.min(0) - self.drawn_distances[best],
        )

    def minus(self, other: "_Resampled", low: float, high: float) -> tuple[Array, Array]:
        """Return the mean gap of each run, and under each resample: (runs,) and (runs, resamples)."""
        runs, resamples = self.drawn_qualities.shape[1:]
        values = [
            mean_gap(
                (self.distances[:, run], self.qualities[:, run]),
                (other.distances[:, run], other.qualities[:, run]),
                low,
                high,
            )
            for run in range(runs)
        ]
        replicates = [
            [
                mean_gap(
                    (self.drawn_distances[:, run, draw], self.drawn_qualities[:, run, draw]),
                    (other.drawn_distances[:, run, draw], other.drawn_qualities[:, run, draw]),
                    low,
                    high,
                )
                for draw in range(resamples)
            ]
            for run in range(runs)
        ]
        return np.asarray(values), np.asarray(replicates)


def reach(distances: Array, qualities: Array) -> tuple[Array, Array]:
    """Return the corners of the best quality within reach, both coordinates ascending.

    distances, qualities: (points,), lower and higher is better
    """
    order = np.lexsort((-qualities, distances))
    distances, qualities = distances[order], qualities[order]
    best = np.maximum.accumulate(qualities)
    corner = np.concatenate([[True], best[1:] > best[:-1]])
    return distances[corner], qualities[corner]


def mean_gap(one: tuple[Array, Array], other: tuple[Array, Array], low: float, high: float) -> float:
    """Return the mean vertical distance of two curves between two distances, exactly.

    one, other: distances and qualities of the points, (points,) each
    low, high:  where they are compared; beyond its corners a curve keeps the quality of the last one
    """
    corners = [reach(*curve) for curve in (one, other)]
    inner = np.concatenate([distances for distances, _ in corners])
    places = np.unique([low, high, *inner[(inner > low) & (inner < high)]])
    first, second = (np.interp(places, *corner) for corner in corners)
    apart = first - second
    if low == high:
        return float(apart[0])
    return float(np.sum((apart[1:] + apart[:-1]) / 2 * np.diff(places)) / (high - low))


def _corrected(found: list[Frontier]) -> list[Frontier]:
    """Return the curves with Holm's correction over all gaps."""
    p = [gap.comparison.p for one in found for gap in one.gaps if gap.comparison is not None]
    corrected, least = iter(holm(p)), least_items(len(p))
    return [
        replace(
            one,
            gaps=[
                gap
                if gap.comparison is None
                else replace(gap, comparison=replace(gap.comparison, p_holm=next(corrected), least=least))
                for gap in one.gaps
            ],
        )
        for one in found
    ]
