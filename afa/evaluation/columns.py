"""One metric over all methods: values with intervals, and the differences of chosen pairs of methods."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from afa.errors import UserError
from afa.evaluation.results import Item, Method, MetricNote
from afa.evaluation.statistics import (
    LEVEL,
    Array,
    Estimate,
    estimates,
    paired_runs,
    prompt_means,
    set_estimate,
    set_test,
    sign_flip_tests,
    win_rates,
    wins,
)

Pair = tuple[str, str]
K = TypeVar("K")


@dataclass(frozen=True)
class Comparison:
    """One method minus another. difference: paired by prompt. wins: share of prompts won, ties a half; None for scores of sets.

    p: of no difference; p_holm: corrected over the report's family, None where a comparison is outside it.
    """

    method: str
    other: str
    difference: Estimate
    higher_is_better: bool
    p: float
    wins: Estimate | None = None
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        """better or worse only if p_holm and the interval both say so; else undecided; "" outside the family."""
        if self.p_holm is None:
            return ""
        if self.p_holm >= LEVEL or not self.difference.excludes_zero:
            return "undecided"
        return "better" if (self.difference.low > 0) == self.higher_is_better else "worse"

    @property
    def reversed(self) -> "Comparison":
        """The same the other way round: other minus method."""
        won = None if self.wins is None else Estimate(1 - self.wins.value, 1 - self.wins.high, 1 - self.wins.low, self.wins.n)
        return replace(self, method=self.other, other=self.method, difference=self.difference.reversed, wins=won)


@dataclass(frozen=True)
class Sample:
    """What one method scored in its runs. seeds: of the runs, rising. Of one kind:

    scores (runs, prompts), where a score is of an image; images of a prompt are averaged. replicates: None.
    scores (runs,), where it is of the whole set of n images; replicates (runs, resamples): the same of resampled prompts.
    """

    seeds: tuple[int, ...]
    scores: Array
    replicates: Array | None = None
    n: int = 0

    def of_seeds(self, seeds: Iterable[int]) -> "Sample":
        """Only the runs with these training seeds; all if it has none of them."""
        chosen = [place for place, seed in enumerate(self.seeds) if seed in set(seeds)] or list(range(len(self.seeds)))
        replicates = None if self.replicates is None else self.replicates[chosen]
        return Sample(tuple(self.seeds[place] for place in chosen), self.scores[chosen], replicates, self.n)


@dataclass(frozen=True)
class Column:
    """One metric. values: by method; by_run: each training run alone, by method and seed; comparisons: by (method, other).

    best: the best single expert, chosen by this very metric on these very images, which favours it.
    """

    metric: str
    note: MetricNote
    samples: Mapping[str, Sample]
    values: Mapping[str, Estimate]
    by_run: Mapping[tuple[str, int], Estimate]
    best: str | None = None
    comparisons: Mapping[Pair, Comparison] = field(default_factory=dict)

    def against(self, method: str, other: str | None) -> Comparison | None:
        """method - other, None if they were not compared."""
        if other is None:
            return None
        back = self.comparisons.get((other, method))
        return self.comparisons.get((method, other), None if back is None else back.reversed)

    def leader(self, names: Iterable[str]) -> str | None:
        """The best of some methods by value; of equals the first by name."""
        sign = -1 if self.note.higher_is_better else 1
        known = [name for name in names if name in self.values]
        return min(known, key=lambda name: (sign * self.values[name].value, name), default=None)


def make_column(metric: str, note: MetricNote, methods: Sequence[Method], items: Sequence[Item]) -> Column:
    """The values of all methods that have this score in at least one run. Raises UserError if they do not pair."""
    prompts = [item.prompt for item in items]
    found = {
        method.name: image_sample(metric, method, prompts) if note.kind == "image" else _set_sample(metric, method)
        for method in methods
    }
    samples = {name: sample for name, sample in found.items() if sample is not None}
    _check_lengths(metric, samples)
    alone = {(name, seed): sample.of_seeds([seed]) for name, sample in samples.items() for seed in sample.seeds}
    return Column(metric, note, samples, _by_key(samples), _by_key(alone))


def compare(column: Column, pairs: Sequence[Pair], derived: Sequence[Pair] = ()) -> dict[Pair, Comparison]:
    """The differences of pairs of methods that have this score, not corrected yet.

    derived: pairs of a variant and what it was derived from, which are compared on the training seeds of the variant.
    """
    samples, higher = column.samples, column.note.higher_is_better
    both = [(samples[one], samples[other]) for one, other in pairs]
    both += [(samples[one], samples[other].of_seeds(samples[one].seeds)) for one, other in derived]
    if not both:
        return {}
    apart = [_minus(one, other) for one, other in both]
    won: Sequence[Estimate | None] = [None] * len(both)
    if column.note.kind == "image":
        won = win_rates([_wins(one, other, higher) for one, other in both])
    found = zip([*pairs, *derived], _estimates(apart), _tests(apart), won, strict=True)
    return {pair: Comparison(*pair, between, higher, p, share) for pair, between, p, share in found}


def image_sample(metric: str, method: Method, prompts: Sequence[int]) -> Sample | None:
    """A score of images from every run that has it for all of them, or for the first so many; None if no run has.

    metric: a score's name, or seconds. prompts: of each image.
    """
    runs = sorted(method.runs, key=lambda run: run.seed)
    given = {run.seed: run.seconds if metric == "seconds" else run.scores.get(metric, []) for run in runs}
    usable = {seed: values for seed, values in given.items() if 0 < len(values) <= len(prompts) and np.isfinite(values).all()}
    longest = max(map(len, usable.values()), default=0)
    whole = {seed: prompt_means(values, prompts[:longest]) for seed, values in usable.items() if len(values) == longest}
    return Sample(tuple(whole), np.stack(list(whole.values()))) if whole else None


def _set_sample(metric: str, method: Method) -> Sample | None:
    runs = sorted(method.runs, key=lambda run: run.seed)
    scores = {run.seed: run.sets[metric] for run in runs if metric in run.sets and np.isfinite(run.sets[metric].value)}
    if not scores:
        return None
    count = min(len(score.replicates) for score in scores.values())
    if count < 2:
        raise UserError(
            f"metric '{metric}' of '{method.name}' has too few resamples for an interval ({count}); run afa evaluate again"
        )
    replicates = np.asarray([score.replicates[:count] for score in scores.values()])
    values = np.asarray([score.value for score in scores.values()])
    return Sample(tuple(scores), values, replicates, min(score.n for score in scores.values()))


def _check_lengths(metric: str, samples: Mapping[str, Sample]) -> None:
    lengths = {sample.scores.shape[1]: name for name, sample in samples.items() if sample.replicates is None}
    if len(lengths) > 1:
        (few, one), (many, other) = sorted(lengths.items())[:2]
        raise UserError(
            f"metric '{metric}' has values of {few} prompts for '{one}', of {many} for '{other}'; run afa evaluate again"
        )


def _by_key(samples: Mapping[K, Sample]) -> dict[K, Estimate]:
    return dict(zip(samples, _estimates(list(samples.values())), strict=True))


def _estimates(samples: Sequence[Sample]) -> list[Estimate]:
    """All of one metric, so all of one kind."""
    of_sets = [set_estimate(sample.scores, sample.replicates, sample.n) for sample in samples if sample.replicates is not None]
    return of_sets or (estimates([sample.scores for sample in samples]) if samples else [])


def _tests(samples: Sequence[Sample]) -> list[float]:
    of_sets = [set_test(sample.scores, sample.replicates) for sample in samples if sample.replicates is not None]
    return of_sets or sign_flip_tests([sample.scores for sample in samples])


def _minus(one: Sample, other: Sample) -> Sample:
    """The difference run by run: prompt by prompt, or resample by resample."""
    scores, others = paired_runs(one.scores, other.scores)
    if one.replicates is None or other.replicates is None:
        return Sample((), scores - others)
    count = min(one.replicates.shape[1], other.replicates.shape[1])
    replicates, against = paired_runs(one.replicates[:, :count], other.replicates[:, :count])
    return Sample((), scores - others, replicates - against, min(one.n, other.n))


def _wins(one: Sample, other: Sample, higher: bool) -> Array:
    scores, others = paired_runs(one.scores, other.scores)
    return wins(scores, others) if higher else wins(others, scores)
