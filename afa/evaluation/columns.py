"""The results of one metric: values of all methods with intervals, and differences of pairs of methods."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from afa.errors import UserError
from afa.evaluation.results import Item, Method, MetricNote, prompts_of
from afa.significance import difference_tests, set_test
from afa.stats import (
    LEVEL,
    Array,
    Estimate,
    differences,
    estimates,
    prompt_means,
    set_estimate,
    win_rates,
    wins,
)

Pair = tuple[str, str]
K = TypeVar("K")


@dataclass(frozen=True)
class Comparison:
    """One method minus another.

    difference: paired by prompt
    p:          of no difference
    wins:       share of prompts won, a tie counts half; None for scores of sets
    p_holm:     p, corrected over the report's comparisons; None if this one is not among them
    prompts:    number of independent prompts
    least:      number of prompts that a verdict needs
    seeds:      training seeds that both methods have, which are paired; empty if neither was trained
    by_seed:    the difference of each training seed
    """

    method: str
    other: str
    difference: Estimate
    higher_is_better: bool
    p: float
    wins: Estimate | None = None
    p_holm: float | None = None
    prompts: int = 0
    least: int = 0
    seeds: tuple[int, ...] = ()
    by_seed: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """Return better or worse if p_holm, interval and number of prompts all say so, else undecided.

        Returns "" for a comparison without p_holm.
        """
        if self.p_holm is None:
            return ""
        if self.p_holm >= LEVEL or self.prompts < self.least or not self.difference.excludes_zero:
            return "undecided"
        return "better" if (self.difference.low > 0) == self.higher_is_better else "worse"

    @property
    def reversed(self) -> "Comparison":
        """Return the comparison the other way round: other minus method."""
        won = (
            None
            if self.wins is None
            else Estimate(1 - self.wins.value, 1 - self.wins.high, 1 - self.wins.low, self.wins.n)
        )
        back = tuple(-value for value in self.by_seed)
        return replace(
            self,
            method=self.other,
            other=self.method,
            difference=self.difference.reversed,
            wins=won,
            by_seed=back,
        )


@dataclass(frozen=True)
class MethodScores:
    """The scores of one method in its runs.

    seeds:      of the runs that have the score, ascending
    scores:     (runs, prompts) if a score is of an image; images of a prompt are averaged.
                (runs,) if it is of the whole set of n images
    replicates: (runs, resamples) scores of sets of resampled prompts; None if a score is of an image
    n:          images of a set
    trained:    whether seeds are training seeds, by which runs are paired
    prompts:    number of independent prompts
    """

    seeds: tuple[int, ...]
    scores: Array
    replicates: Array | None = None
    n: int = 0
    trained: bool = False
    prompts: int = 0

    def of_seeds(self, seeds: Sequence[int]) -> "MethodScores":
        """Return the runs with these training seeds; an untrained method repeats its one run."""
        chosen = [self.seeds.index(seed) if self.trained else 0 for seed in seeds]
        replicates = None if self.replicates is None else self.replicates[chosen]
        return replace(self, seeds=tuple(seeds), scores=self.scores[chosen], replicates=replicates)

    def means(self) -> tuple[float, ...]:
        """Return the mean of each training run; empty for an untrained method."""
        return tuple(float(run.mean()) for run in self.scores) if self.trained else ()


@dataclass(frozen=True)
class Column:
    """One metric.

    values:      by method
    by_run:      each training run alone, by method and seed
    best:        the best single expert by this metric on these images, a choice that favours the expert
    comparisons: by (method, other)
    """

    metric: str
    note: MetricNote
    samples: Mapping[str, MethodScores]
    values: Mapping[str, Estimate]
    by_run: Mapping[tuple[str, int], Estimate]
    best: str | None = None
    comparisons: Mapping[Pair, Comparison] = field(default_factory=dict)

    @property
    def header(self) -> str:
        """Return the metric's name and which way is better."""
        return f"{self.metric} {'↑' if self.note.higher_is_better else '↓'}"

    def against(self, method: str, other: str | None) -> Comparison | None:
        """Return method minus other; None if they were not compared."""
        if other is None:
            return None
        back = self.comparisons.get((other, method))
        return self.comparisons.get((method, other), None if back is None else back.reversed)

    def leader(self, names: Iterable[str]) -> str | None:
        """Return the best of some methods by value; of equal ones the first by name."""
        sign = -1 if self.note.higher_is_better else 1
        known = [name for name in names if name in self.values]
        return min(known, key=lambda name: (sign * self.values[name].value, name), default=None)


def make_column(metric: str, note: MetricNote, methods: Sequence[Method], items: Sequence[Item]) -> Column:
    """Return the values of all methods that have this score in at least one run.

    Raises UserError if their numbers of prompts differ.
    """
    prompts, samples = prompts_of(items), {}
    for method in methods:
        found = (image_sample if note.kind == "image" else _set_sample)(method, prompts, metric)
        if found is not None:
            samples[method.name] = found
    lengths = {sample.scores.shape[1]: name for name, sample in samples.items() if sample.replicates is None}
    if len(lengths) > 1:
        (few, one), (many, other) = sorted(lengths.items())[:2]
        raise UserError(
            f"metric '{metric}' has values of {few} prompts for '{one}', of {many} for '{other}'; "
            "run afa evaluate again"
        )
    alone = {
        (name, seed): sample.of_seeds([seed]) for name, sample in samples.items() for seed in sample.seeds
    }
    return Column(metric, note, samples, _by_key(samples), _by_key(alone))


def compare(column: Column, pairs: Sequence[Pair]) -> dict[Pair, Comparison]:
    """Return the differences of pairs of methods that have this score; p-values are not corrected yet.

    Pairs that share no training seed are left out.
    """
    samples, higher, both = column.samples, column.note.higher_is_better, {}
    for pair in pairs:
        one, other = (samples[name] for name in pair)
        # Runs are paired by training seed; an untrained run is paired with all runs of the other.
        seeds = list(one.seeds if one.trained else other.seeds)
        if one.trained and other.trained:
            seeds = [seed for seed in seeds if seed in other.seeds]
        if seeds:
            both[pair] = one.of_seeds(seeds), other.of_seeds(seeds)
    if not both:
        return {}
    apart = [_minus(one, other) for one, other in both.values()]
    won: Sequence[Estimate | None] = [None] * len(both)
    if column.note.kind == "image":
        ordered = [(one, other) if higher else (other, one) for one, other in both.values()]
        won = win_rates([wins(one.scores, other.scores) for one, other in ordered])
    tests = [
        set_test(minus.scores, minus.replicates, minus.prompts)
        for minus in apart
        if minus.replicates is not None
    ] or difference_tests([minus.scores for minus in apart])
    width = float(np.ptp(_span(samples.values())))
    between = _estimates(apart, (-width, width), differences)
    return {
        pair: Comparison(*pair, gap, higher, p, share, None, minus.prompts, 0, minus.seeds, minus.means())
        for pair, minus, gap, p, share in zip(both, apart, between, tests, won, strict=True)
    }


def image_sample(method: Method, prompts: Sequence[int], metric: str | None = None) -> MethodScores | None:
    """Return a score of images, from the runs with the most images that have it; None if no run has it.

    prompts: of each image
    metric:  name of a score; None: seconds per image
    """
    runs = sorted(method.runs, key=lambda run: run.seed)
    given = {run.seed: run.seconds if metric is None else run.scores.get(metric, []) for run in runs}
    usable = {
        seed: values
        for seed, values in given.items()
        if 0 < len(values) <= len(prompts) and np.isfinite(values).all()
    }
    longest = max(map(len, usable.values()), default=0)
    whole = {
        seed: prompt_means(values, prompts[:longest])
        for seed, values in usable.items()
        if len(values) == longest
    }
    if not whole:
        return None
    return MethodScores(
        tuple(whole),
        np.stack(list(whole.values())),
        trained=method.is_trained,
        prompts=len(set(prompts[:longest])),
    )


def _set_sample(method: Method, prompts: Sequence[int], metric: str) -> MethodScores | None:
    """Return a score of sets, from the runs that have it; None if no run has it."""
    runs = sorted(method.runs, key=lambda run: run.seed)
    given = {run.seed: run.sets[metric] for run in runs if metric in run.sets}
    scores = {
        seed: score
        for seed, score in given.items()
        if np.isfinite(score.value) and np.isfinite(score.replicates).all()
    }
    if not scores:
        return None
    count = min(len(score.replicates) for score in scores.values())
    if count < 2:
        raise UserError(
            f"metric '{metric}' of '{method.name}' has too few resamples for an interval ({count}); "
            "run afa evaluate again"
        )
    replicates = np.asarray([score.replicates[:count] for score in scores.values()])
    values = np.asarray([score.value for score in scores.values()])
    images = min(score.n for score in scores.values())
    return MethodScores(
        tuple(scores), values, replicates, images, method.is_trained, len(set(prompts[:images]))
    )


def _by_key(samples: Mapping[K, MethodScores]) -> dict[K, Estimate]:
    return dict(zip(samples, _estimates(list(samples.values()), _span(samples.values())), strict=True))


def _span(samples: Iterable[MethodScores]) -> tuple[float, float]:
    """Return the smallest and the largest mean score of any prompt and method."""
    known = [sample.scores.mean(0) for sample in samples if sample.replicates is None]
    return (float(min(map(np.min, known))), float(max(map(np.max, known)))) if known else (0.0, 0.0)


def _estimates(
    samples: Sequence[MethodScores],
    span: tuple[float, float],
    of_prompts: Callable[..., list[Estimate]] = estimates,
) -> list[Estimate]:
    """Estimate the samples of one metric.

    of_prompts: estimates, or differences
    """
    of_sets = [
        set_estimate(sample.scores, sample.replicates, sample.n)
        for sample in samples
        if sample.replicates is not None
    ]
    return of_sets or (of_prompts([sample.scores for sample in samples], span=span) if samples else [])


def _minus(one: MethodScores, other: MethodScores) -> MethodScores:
    """Subtract paired runs: prompt by prompt, or resample by resample."""
    trained = one.trained or other.trained
    made = replace(one, seeds=one.seeds if trained else (), scores=one.scores - other.scores, trained=trained)
    if one.replicates is None or other.replicates is None:
        return made
    count = min(one.replicates.shape[1], other.replicates.shape[1])
    replicates = one.replicates[:, :count] - other.replicates[:, :count]
    return replace(made, replicates=replicates, n=min(one.n, other.n))
