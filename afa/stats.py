"""A number is an estimate: a value, its 95 % interval and how many items it rests on.

Prompts are resampled: images of one prompt are averaged first, so a prompt's images always stay together.
Methods that are compared share the resamples, so what prompts do to all methods cancels. See estimates() for
what several training runs add. What these intervals and tests are worth is simulated by
benchmarks/intervals.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
BLOCK = 4_000_000  # draws held in memory at once
LEVEL = 0.05  # 1 - the intervals' confidence; also of the tests
QUANTILES = (LEVEL / 2, 1 - LEVEL / 2)
RUNS = 1  # its stream of random numbers is another one than that of the resamples
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

        places: digits after the point
        signed: also show the sign of a positive value
        """
        kind = f"{'+' if signed else ''}.{places}f"
        around = f" [{self.low:{kind}}, {self.high:{kind}}]" if self.has_interval else ""
        return f"{self.value:{kind}}{around}"

    @property
    def has_interval(self) -> bool:
        """Whether the items show a spread: one item, or items that are all equal, do not."""
        return self.n > 1 and not math.isclose(self.low, self.high, abs_tol=1e-12)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero and rests on enough items for a claim."""
        return self.n >= least_items() and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        """What may be claimed of a difference: "higher than", "lower than" or "not distinguishable from"."""
        if not self.excludes_zero:
            return "not distinguishable from"
        return "higher than" if self.low > 0 else "lower than"

    def too_few(self, item: str) -> str:
        """A clause that says that there are too few items for any claim; empty if there are enough.

        item: what an item is, in one word
        """
        few = (
            f"; here {'is' if self.n == 1 else 'are'} {self.n} {item}{'' if self.n == 1 else 's'}, "
            f"a claim needs at least {least_items()}"
        )
        return few if self.n < least_items() else ""

    @property
    def reversed(self) -> "Estimate":
        """The same with the other sign: the difference B - A where this is A - B."""
        return Estimate(-self.value, -self.high, -self.low, self.n)


def estimate(values: NDArray[np.floating], seed: int = 0) -> Estimate:
    """The mean of one value per item, with its percentile bootstrap interval over items.

    values: (n,)
    seed:   of the resamples
    Raises ValueError for no items.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    sample: Array = np.asarray(values, np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"an estimate needs one value per item, got shape {sample.shape}")
    return estimates([sample[None]], seed)[0]


def difference(values: NDArray[np.floating], others: NDArray[np.floating], seed: int = 0) -> Estimate:
    """The mean of values - others, paired item by item: what both share (a hard prompt) cancels.

    values, others: (n,) of the same items
    seed:           of the resamples
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
    """1 - mean(values) / the least mean of the others, paired item by item.

    values: (n,) such as losses
    others: (k, n). Which of them is best is found anew in every resample, so that one that was lucky on these
            items is not taken for better than it is.
    seed:   of the resamples
    Raises ValueError if they do not pair.
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
    """How many items a claim needs: with fewer, no sign-flip p is below LEVEL after Holm's correction.

    The least p of n items is 2 / 2^n (all differences of one sign).
    comparisons: size of the family that is corrected
    """
    return math.floor(math.log2(2 * max(1, comparisons) / LEVEL)) + 1


def prompt_draws(prompts: int, resamples: int) -> NDArray[np.int64]:
    """The prompts that each resample of a set of images takes, the same for all methods.

    Returns (resamples, prompts).
    """
    return np.random.default_rng(0).integers(prompts, size=(resamples, prompts))


def prompt_means(values: Sequence[float] | Array, prompts: Sequence[int]) -> Array:
    """Average the images of each prompt.

    values:  (images,)
    prompts: (images,) number of each image's prompt
    Returns (prompts,) in the order of the prompts' numbers.
    """
    _, place = np.unique(np.asarray(prompts), return_inverse=True)
    return np.bincount(place, np.asarray(values, np.float64)) / np.bincount(place)


def wins(one: Array, other: Array) -> Array:
    """1 where the first is higher, a half where both are equal, else 0. Shapes as given."""
    return np.where(one > other, 1.0, np.where(one == other, 0.5, 0.0))


def estimates(
    samples: Sequence[Array], seed: int = 0, span: tuple[float, float] | None = None
) -> list[Estimate]:
    """The mean of each sample with its interval, all under the same resamples of the prompts.

    samples: (runs, prompts) each
    seed:    of the resamples
    span:    the least and the largest value that a prompt can have, where known
    Returns one Estimate a sample; its n is the number of prompts.

    One or two runs: the percentile bootstrap, for other prompts and these trained models. From SEVERAL runs
    on, prompts and runs are crossed, and the interval is for other prompts *and* other training seeds, see
    run_effects().

    Below PADDED prompts two pseudo-prompts are added before resampling, as high and as low as any prompt of
    the sample, or the ends of the span where all prompts have one value. Few prompts seldom show how far
    others may lie: without them, 20 prompts near the end of a scale have intervals that cover too seldom, or
    no width at all. It is Agresti and Coull's idea (see win_rates) on any scale.
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
        far = prompts[np.argmax(np.abs(prompts - middle))] - middle  # so that B - A has the mirrored interval
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
        if sample.shape[1] < PADDED:  # pseudo-prompts may have moved the interval away from the mean
            low, high = min(value, low), max(value, high)
        found.append(Estimate(value, float(low), float(high), sample.shape[1]))
    return found


def win_rates(samples: Sequence[Array], seed: int = 0) -> list[Estimate]:
    """Shares of prompts won, with intervals within 0 and 1.

    Two prompts won and two lost are added before resampling. Otherwise a method that has won no prompt would
    be certain never to win one.
    samples: (runs, prompts) of wins() each
    seed:    of the resamples
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
        low, high = max(0.0, min(value, around.low)), min(1.0, max(value, around.high))
        found.append(Estimate(value, low, high, prompts) if prompts > 1 else Estimate(value, value, value, 1))
    return found


def run_effects(values: Array, replicates: Array, seed: int = 0) -> Array:
    """Draw what other training seeds would add to a mean over runs.

    Runs are too few to be resampled too: where seeds matter most, the percentile interval of three resampled
    runs covers the truth three times out of four. So their part is drawn from Student's t with runs - 1
    degrees of freedom, times the standard error of the mean over runs. How far runs lie apart only because
    their images do is in the replicates already, and is subtracted (variance components by analysis of
    variance, none below zero). In simulations with three runs the intervals covered 90 to 96 %.
    values:     (runs,)
    replicates: (runs, resamples) the same under resampled prompts
    seed:       of the draws
    Returns (resamples,); zeros below SEVERAL runs.
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
    """A score of a whole set of images, or a difference of two, with its interval.

    A distance between sets grows when images are drawn twice, so only the replicates' spread is used: the
    interval is value + (quantiles of replicates - their mean).
    values:     (runs,)
    replicates: (runs, resamples) the same under resampled prompts
    n:          number of images
    seed:       of the draws for training seeds
    """
    draws = replicates.mean(0) + run_effects(values, replicates, seed)
    low, high = np.quantile(draws, QUANTILES) - replicates.mean()
    return Estimate(float(values.mean()), float(values.mean() + low), float(values.mean() + high), n)


def kept_share(method: Array, reference: Array, whole: Array, seed: int = 0) -> Estimate:
    """The share of a gain over a reference that a method keeps: (method - reference) / (whole - reference).

    method, reference, whole: (runs, prompts) each, of the same prompts, higher is better; the runs of the
                              last two are averaged
    seed:                     of the resamples
    The interval is over prompts and over the method's runs; it has no end where there may be no gain.
    """
    base, full = reference.mean(0), whole.mean(0)
    rows = np.concatenate([method, base[None], full[None]])
    *means, low, high = _resampled_means(rows, seed)
    gain = high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (method.mean(1) - base.mean()) / (full.mean() - base.mean())
        shares = (np.stack(means) - low) / gain
    certain = bool((gain > 0).all())
    ends = (-np.inf, np.inf)
    if certain:
        ends = tuple(np.quantile(shares.mean(0) + run_effects(value, shares, seed), QUANTILES))
    return Estimate(float(value.mean()), float(ends[0]), float(ends[1]), method.shape[1])


def _resampled_means(rows: Array, seed: int) -> Array:
    """(k, n) -> (k, RESAMPLES): the mean of each row under the same draws of n items."""
    return np.concatenate([weighted_means(counts, rows) for counts in _counts(rows.shape[1], seed)], axis=1)


def weighted_means(draws: NDArray[np.int8], rows: Array) -> Array:
    """Means under weights: draws (draws, n) and rows (k, n) -> (k, draws)."""
    return rows @ draws.T.astype(np.float64) / rows.shape[1]


def blocks(n: int, draws: int) -> Iterator[int]:
    """How many draws of n numbers each to make at once, so that a block holds at most BLOCK numbers."""
    size = max(1, BLOCK // n)
    yield from (min(size, draws - start) for start in range(0, draws, size))


@lru_cache(maxsize=4)
def _kept_counts(n: int, seed: int) -> tuple[NDArray[np.int8], ...]:
    return tuple(_drawn_counts(n, seed))


def _counts(n: int, seed: int) -> Sequence[NDArray[np.int8]] | Iterator[NDArray[np.int8]]:
    """How often each of n items is drawn in each resample, in blocks (resamples, n)."""
    return _kept_counts(n, seed) if n * RESAMPLES <= 5 * BLOCK else _drawn_counts(n, seed)


def _drawn_counts(n: int, seed: int) -> Iterator[NDArray[np.int8]]:
    rng = np.random.default_rng(seed)
    for size in blocks(n, RESAMPLES):
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.int8)
