"""A number is an estimate: a value, its 95 % interval and how many items it rests on.

Prompts are resampled: images of one prompt are averaged first, so a prompt's images always stay together.
Methods that are compared share the resamples, so what prompts do to all methods cancels. See estimates() for
what several training runs add. What these intervals and tests are worth is simulated by
benchmarks/statistics.py.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
FLIPS = 50_000  # sign flips; more than resamples, since Holm's correction needs small p
BLOCK = 4_000_000  # draws held in memory at once
LEVEL = 0.05  # 1 - the intervals' confidence; also of the tests
QUANTILES = (LEVEL / 2, 1 - LEVEL / 2)
RUNS, SIGNS, NORMAL, STUDENT = 1, 2, 3, 4  # streams of random numbers, apart from that of the resamples
PADDED = 60  # with fewer items than this, two pseudo-items are added before resampling
SEVERAL = 3  # training seeds; with fewer, numbers are about the trained models only


@dataclass(frozen=True)
class Estimate:
    """A mean over n items with its 95 % bootstrap interval [low, high]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return self.words(3)

    def words(self, places: int, signed: bool = False) -> str:
        """0.123 [0.120, 0.126]; without brackets where there is no interval.

        places: digits after the point.
        """
        kind = f"{'+' if signed else ''}.{places}f"
        around = f" [{self.low:{kind}}, {self.high:{kind}}]" if self.has_interval else ""
        return f"{self.value:{kind}}{around}"

    @property
    def has_interval(self) -> bool:
        """True if the items show a spread: one item, or items that are all equal, do not."""
        return self.n > 1 and not math.isclose(self.low, self.high, abs_tol=1e-12)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero and rests on enough items for a claim."""
        return self.n >= least_items() and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """Of a difference: what may be claimed, "higher than", "lower than" or "not distinguishable from"."""
        if not self.excludes_zero:
            return "not distinguishable from"
        return "higher than" if self.low > 0 else "lower than"

    def too_few(self, item: str) -> str:
        """Where there are too few items for any claim: a clause that says so; else nothing.

        item: what they are, in one word.
        """
        few = (
            f"; here {'is' if self.n == 1 else 'are'} {self.n} {item}{'' if self.n == 1 else 's'}, "
            f"a claim needs at least {least_items()}"
        )
        return few if self.n < least_items() else ""

    @property
    def reversed(self) -> "Estimate":
        """The same with the other sign: of B - A where this is of A - B."""
        return Estimate(-self.value, -self.high, -self.low, self.n)


def estimate(values: NDArray[np.floating], seed: int = 0) -> Estimate:
    """The mean of one value per item (n,), with the percentile bootstrap over items.

    Raises ValueError for no items.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    sample: Array = np.asarray(values, np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"an estimate needs one value per item, got shape {sample.shape}")
    return estimates([sample[None]], seed)[0]


def difference(values: NDArray[np.floating], others: NDArray[np.floating], seed: int = 0) -> Estimate:
    """values - others, paired item by item: what both share (a hard prompt) cancels.

    Raises ValueError if they do not pair.
    """
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if values.shape != others.shape:
        raise ValueError(
            f"paired values must be of the same items, got shapes {values.shape} and {others.shape}"
        )
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a difference needs one value per item, got shape {values.shape}")
    return differences([(values - others)[None]], seed)[0]


def gain(values: NDArray[np.floating], others: NDArray[np.floating], seed: int = 0) -> Estimate:
    """Estimate 1 - mean(values) / the least mean of the others, paired item by item.

    values (n,), others (k, n), such as losses. Which of the others is best is found anew in every resample,
    so that the one that was lucky on these items is not taken for better than it is.
    """
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if others.ndim != 2 or values.shape != others.shape[1:] or not len(values):
        raise ValueError(
            f"paired values must be of the same items, got shapes {values.shape} and {others.shape}"
        )
    means = _resampled_means(np.concatenate([values[None], others]), seed)
    low, high = np.quantile(1 - means[0] / means[1:].min(0), QUANTILES)
    return Estimate(float(1 - values.mean() / others.mean(1).min()), float(low), float(high), len(values))


def least_items(comparisons: int = 1) -> int:
    """Return how many items a claim needs: with fewer, no sign-flip p is below LEVEL after Holm's correction.

    The least p of n items is 2 / 2^n (all differences of one sign). comparisons: of the family that is
    corrected.
    """
    return math.floor(math.log2(2 * max(1, comparisons) / LEVEL)) + 1


def prompt_means(values: Sequence[float] | Array, prompts: Sequence[int]) -> Array:
    """One value an image (images,) -> one a prompt, in the order of the prompts' numbers.

    prompts: of each image.
    """
    _, place = np.unique(np.asarray(prompts), return_inverse=True)
    return np.bincount(place, np.asarray(values, np.float64)) / np.bincount(place)


def wins(one: Array, other: Array) -> Array:
    """Where the first is higher: 1, where both are equal: a half, else 0. Shapes as given."""
    return np.where(one > other, 1.0, np.where(one == other, 0.5, 0.0))


def estimates(
    samples: Sequence[Array], seed: int = 0, span: tuple[float, float] | None = None
) -> list[Estimate]:
    """The mean of each sample (runs, prompts), all under the same resamples of the prompts. n: prompts.

    One or two runs: the percentile bootstrap of estimate(), for other prompts and these very runs. From
    SEVERAL runs on, prompts and runs are crossed, and the interval is for other prompts *and* other training
    seeds, see run_effects().

    Below PADDED prompts two pseudo-prompts are added before resampling, as high and as low as any prompt of
    the sample, or the ends of the span where all prompts have one value. Few prompts seldom show how far
    others may lie: without, 20 prompts near the end of a scale have intervals that cover too seldom, or no
    width at all. It is Agresti and Coull's idea (see win_rates) on any scale. span: the least and the largest
    value a prompt can have, where known.
    """
    padded = []
    for sample in samples:
        prompts = sample.mean(0)
        ends = (prompts.min(), prompts.max())
        padded.append(_padded(sample, ends if span is None or ends[0] < ends[1] else span))
    return _estimates(padded, samples, seed)


def differences(
    samples: Sequence[Array], seed: int = 0, span: tuple[float, float] | None = None
) -> list[Estimate]:
    """As estimates(), of paired differences (runs, prompts).

    Here the pseudo-prompts lie on both sides of the median, as far as the prompt that is farthest from it:
    few differences often lie on one side only. Differences that are all zero are of one and the same thing,
    and not padded.
    """
    padded = []
    for sample in samples:
        prompts = sample.mean(0)
        middle = np.median(prompts)
        far = (
            prompts[np.argmax(np.abs(prompts - middle))] - middle
        )  # in this order, so that B - A has the mirrored interval
        ends = (middle + far, middle - far)
        if span is not None and far == 0 and middle != 0:
            ends = tuple(sorted(span, key=lambda end: -abs(end - middle)))
        padded.append(_padded(sample, ends))
    return _estimates(padded, samples, seed)


def _padded(sample: Array, ends: Sequence[float]) -> Array:
    """Add two pseudo-prompts of these values if prompts are few: (runs, prompts) -> (runs, prompts + 2)."""
    if not 1 < sample.shape[1] < PADDED:
        return sample
    return np.concatenate([sample, np.tile(np.asarray(ends, np.float64), (len(sample), 1))], axis=1)


def _estimates(resampled: Sequence[Array], samples: Sequence[Array], seed: int) -> list[Estimate]:
    """The means of samples (runs, prompts), their intervals from what is resampled instead (runs, items)."""
    means = _resampled_means(np.concatenate(resampled), seed)  # (runs of all, resamples)
    found, start = [], 0
    for sample in samples:
        rows, value = means[start : start + len(sample)], float(sample.mean())
        start += len(sample)
        draws = rows.mean(0) + run_effects(sample.mean(1), rows, seed)
        low, high = np.quantile(draws, QUANTILES)
        around = (
            (float(low), float(high))
            if sample.shape[1] >= PADDED
            else (min(value, float(low)), max(value, float(high)))
        )
        found.append(Estimate(value, *around, sample.shape[1]))
    return found


def win_rates(samples: Sequence[Array], seed: int = 0) -> list[Estimate]:
    """Shares of prompts won from samples of wins (runs, prompts), with intervals within 0 and 1.

    Two prompts won and two lost are added before resampling: else who has won none would be certain never to
    win one.
    Source: Agresti and Coull, Approximate is better than "exact" (1998), on shares; here for halves and runs
    too.
    """
    padded = [
        np.concatenate([sample, np.tile([1.0, 1.0, 0.0, 0.0], (len(sample), 1))], axis=1)
        for sample in samples
    ]
    found = []
    for sample, around in zip(samples, _estimates(padded, samples, seed), strict=True):
        value, prompts = around.value, sample.shape[1]
        low, high = (
            (max(0.0, min(value, around.low)), min(1.0, max(value, around.high)))
            if prompts > 1
            else (value, value)
        )
        found.append(Estimate(value, low, high, prompts))
    return found


def run_effects(values: Array, replicates: Array, seed: int = 0) -> Array:
    """Draw what other training seeds would add to a mean over runs: (resamples,); zeros below SEVERAL runs.

    values (runs,), replicates (runs, resamples) of them under resampled prompts. Runs are too few to be
    resampled too: where seeds matter most, the percentile interval of three resampled runs covers the truth
    three times out of four. So their part is drawn from Student's t with runs - 1 degrees of freedom, times
    the standard error of the mean over runs. How far runs lie apart only because their images do is in the
    replicates already and is subtracted (variance components by analysis of variance, none below zero). In
    simulations with three runs the intervals covered 90 to 96 %.
    Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 4; on resampling both ways,
    Owen, The pigeonhole bootstrap (2007).
    """
    runs, resamples = replicates.shape
    if runs < SEVERAL:
        return np.zeros(resamples)
    noise = (replicates - replicates.mean(0)).var(1).sum() / (runs - 1)
    error = np.sqrt(max(0.0, values.var(ddof=1) - noise) / runs)
    return error * np.random.default_rng((seed, RUNS, runs)).standard_t(runs - 1, resamples)


def set_estimate(values: Array, replicates: Array, n: int, seed: int = 0) -> Estimate:
    """Estimate a score of n images, or a difference of two: values (runs,), replicates (runs, resamples).

    A distance between sets grows when images are drawn twice, so only the replicates' spread is used: the
    interval is value + (quantiles of replicates - their mean).
    """
    draws = replicates.mean(0) + run_effects(values, replicates, seed)
    low, high = np.quantile(draws, QUANTILES) - replicates.mean()
    return Estimate(float(values.mean()), float(values.mean() + low), float(values.mean() + high), n)


def difference_tests(samples: Sequence[Array], seed: int = 0) -> list[float]:
    """Two-sided p of each sample of differences (runs, prompts), for Holm's correction.

    One or two runs: the sign-flip p, about these very runs. From SEVERAL runs on: the larger of that and
    crossed_test()'s p, which is about other training seeds, too. Raises ValueError for values that are not
    finite.
    """
    flipped = sign_flip_tests(samples, seed)
    several = [len(sample) >= SEVERAL and sample.shape[1] > 1 for sample in samples]
    return [
        max(p, crossed_test(sample, seed)) if more else p
        for p, sample, more in zip(flipped, samples, several, strict=True)
    ]


def sign_flip_tests(samples: Sequence[Array], seed: int = 0) -> list[float]:
    """Return the two-sided sign-flip p of each sample of differences (runs, prompts).

    The signs of the prompts' differences (means over runs) are flipped: in all ways where there are at most
    FLIPS of them, else at random; p is how often the mean is as far from zero. Right for any distribution,
    also for few and coarse differences, where a bootstrap is too sure. It is about these runs. Raises
    ValueError for values that are not finite.
    Source: Fisher, The Design of Experiments (1935), section 21; plus one: Phipson and Smyth (2010).
    """
    prompts = np.stack([sample.mean(0) for sample in samples])  # (samples, prompts)
    _check_finite(prompts)
    if 2 ** prompts.shape[1] <= FLIPS:
        ways = np.asarray(list(itertools.product((-1, 1), repeat=prompts.shape[1])), np.int8)
        return [
            float(_beyond(row.mean(), draws).mean())
            for row, draws in zip(prompts, _product(ways, prompts), strict=True)
        ]
    null = np.concatenate([_product(signs, prompts) for signs in _signs(prompts.shape[1], seed)], axis=1)
    return [_tail(row.mean(), draws) for row, draws in zip(prompts, null, strict=True)]


def crossed_test(sample: Array, seed: int = 0) -> float:
    """Two-sided p of no mean difference among other prompts *and* other training seeds.

    sample: differences (runs, prompts).

    Analysis of variance with prompts and seeds crossed, both random: the mean's variance has the error term
    MS_prompts + MS_seeds - MS_rest with Satterthwaite's degrees of freedom. Seeds that lie no further apart
    than the rest count as equal.
    Raises ValueError for values that are not finite, or fewer than two runs or prompts.
    Source: Winer, Statistical Principles in Experimental Design (1971), section 5.15, on quasi F ratios.
    """
    runs, prompts = sample.shape
    if runs < 2 or prompts < 2:
        raise ValueError(f"crossed runs and prompts need at least two of each, got shape {sample.shape}")
    _check_finite(sample)
    mean, of_runs, of_prompts = sample.mean(), sample.mean(1), sample.mean(0)
    freedom = (runs - 1) * (prompts - 1)
    rest = ((sample - of_runs[:, None] - of_prompts + mean) ** 2).sum() / freedom
    parts = [(prompts * of_runs.var(ddof=1), runs - 1), (-rest, freedom)]
    parts = [
        (runs * of_prompts.var(ddof=1), prompts - 1),
        *(parts if sum(part for part, _ in parts) > 0 else []),
    ]
    return _student(mean * math.sqrt(runs * prompts), parts, seed)


def set_test(values: Array, replicates: Array, n: int = 0, seed: int = 0) -> float:
    """Two-sided p of a difference of set scores, shapes as in set_estimate. n: prompts that were resampled.

    Such a difference has no part for each prompt to flip, and few replicates, so it is held against a normal
    distribution with their spread: about these runs. From SEVERAL runs on, the larger of that and of
    Student's t with the spread of the runs added, as in crossed_test(). Raises ValueError for values that are
    not finite.
    """
    _check_finite(values)
    _check_finite(replicates)
    spread = replicates.mean(0).std()
    p = _tail(float(values.mean()), spread * np.random.default_rng((seed, NORMAL)).standard_normal(FLIPS))
    runs = len(values)
    if runs < SEVERAL:
        return p
    between = values.var(ddof=1) / runs
    noise = (replicates - replicates.mean(0)).var(1).sum() / (runs - 1) / runs
    freedom = max(1, n - 1)
    parts = [(between, runs - 1), (-noise, (runs - 1) * freedom)]
    parts = [(spread**2, freedom), *(parts if between > noise else [])]
    return max(p, _student(float(values.mean()), parts, seed))


def holm(p: Sequence[float]) -> list[float]:
    """Correct the p-values of one family, so that the chance of a single false claim in it stays below p.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = np.argsort(p, kind="stable")
    corrected = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    found = np.empty(len(p))
    found[order] = np.minimum(1, np.maximum.accumulate(corrected))
    return [float(value) for value in found]


def _tail(value: float, null: Array) -> float:
    """Return the share of the null's draws at least as far from zero as the value, which counts as a draw."""
    return float((1 + _beyond(value, null).sum()) / (1 + len(null)))


def _beyond(value: float, null: Array) -> NDArray[np.bool_]:
    return np.abs(null) >= abs(value) * (1 - 1e-9)  # equal but for rounding is equal


def _student(value: float, parts: Sequence[tuple[float, int]], seed: int) -> float:
    """Return the two-sided p of a value whose variance is a sum of (mean square, freedom) parts."""
    variance = sum(part for part, _ in parts)
    if variance <= 0:
        return 1.0 if value == 0 else 1 / (1 + FLIPS)
    freedom = variance**2 / sum(part**2 / of for part, of in parts)
    return _tail(
        value / math.sqrt(variance), np.random.default_rng((seed, STUDENT)).standard_t(freedom, FLIPS)
    )


def _check_finite(values: Array) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} values are no finite numbers; "
            "leave these runs out"
        )


def _resampled_means(rows: Array, seed: int) -> Array:
    """(k, n) -> (k, RESAMPLES): the mean of each row under the same draws of n items."""
    return np.concatenate([_product(counts, rows) for counts in _counts(rows.shape[1], seed)], axis=1)


def _product(draws: NDArray[np.int8], rows: Array) -> Array:
    """(draws, n) and (k, n) -> (k, draws): weighted means."""
    return rows @ draws.T.astype(np.float64) / rows.shape[1]


def _blocks(n: int, draws: int) -> Iterator[int]:
    """So many draws of n numbers in parts of at most BLOCK numbers."""
    size = max(1, BLOCK // n)
    yield from (min(size, draws - start) for start in range(0, draws, size))


@lru_cache(maxsize=4)
def _kept_counts(n: int, seed: int) -> tuple[NDArray[np.int8], ...]:
    return tuple(_drawn_counts(n, seed))


def _counts(n: int, seed: int) -> Sequence[NDArray[np.int8]] | Iterator[NDArray[np.int8]]:
    """Yield how often each of n items is drawn in each resample, in blocks (resamples, n)."""
    return _kept_counts(n, seed) if n * RESAMPLES <= 5 * BLOCK else _drawn_counts(n, seed)


def _drawn_counts(n: int, seed: int) -> Iterator[NDArray[np.int8]]:
    rng = np.random.default_rng(seed)
    for size in _blocks(n, RESAMPLES):
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.int8)


def _signs(n: int, seed: int) -> Iterator[NDArray[np.int8]]:
    """Random signs in blocks (flips, n)."""
    rng = np.random.default_rng((seed, SIGNS))
    for size in _blocks(n, min(FLIPS, max(RESAMPLES, 12 * BLOCK // n))):
        yield (2 * rng.integers(2, size=(size, n), dtype=np.int8) - 1).astype(np.int8)
