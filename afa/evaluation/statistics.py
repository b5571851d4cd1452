"""A number is an estimate: a value, its 95 % interval and how many items it rests on.

What is resampled are prompts: images of one prompt are averaged first, so a prompt's images always stay together. Whatever is
compared shares the resamples, so what prompts do to all methods cancels. See estimates() for what several training runs add.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
FLIPS = 50_000  # of signs, more than resamples: correction for many comparisons needs small p; fewer of very many prompts
BLOCK = 4_000_000  # draws held in memory at once
LEVEL = 0.05  # 1 - the intervals' confidence; also of the tests
QUANTILES = (LEVEL / 2, 1 - LEVEL / 2)
RUNS, SIGNS, NORMAL = 1, 2, 3  # streams of random numbers, apart from that of the resamples


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

    @property
    def reversed(self) -> "Estimate":
        """The same with the other sign: of B - A where this is of A - B."""
        return Estimate(-self.value, -self.high, -self.low, self.n)


def estimate(values: NDArray[np.floating], seed: int = 0) -> Estimate:
    """The mean of one value per item (n,), with the percentile bootstrap over items. Raises ValueError for no items.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    sample: Array = np.asarray(values, np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"an estimate needs one value per item, got shape {sample.shape}")
    return estimates([sample[None]], seed)[0]


def difference(values: NDArray[np.floating], others: NDArray[np.floating], seed: int = 0) -> Estimate:
    """values - others, paired item by item: what both share (a hard prompt) cancels. Raises ValueError if they do not pair."""
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if values.shape != others.shape:
        raise ValueError(f"paired values must be of the same items, got shapes {values.shape} and {others.shape}")
    return estimate(values - others, seed)


def gain(values: NDArray[np.floating], others: NDArray[np.floating], seed: int = 0) -> Estimate:
    """1 - mean(values) / the least mean of the others: how much lower than the best of them, paired item by item.

    values (n,), others (k, n), such as losses. Which of the others is best is found anew in every resample, so that the one that was
    lucky on these items is not taken for better than it is.
    """
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if others.ndim != 2 or values.shape != others.shape[1:] or not len(values):
        raise ValueError(f"paired values must be of the same items, got shapes {values.shape} and {others.shape}")
    means = _resampled_means(np.concatenate([values[None], others]), seed)
    low, high = np.quantile(1 - means[0] / means[1:].min(0), QUANTILES)
    return Estimate(float(1 - values.mean() / others.mean(1).min()), float(low), float(high), len(values))


def prompt_means(values: Sequence[float] | Array, prompts: Sequence[int]) -> Array:
    """One value an image (images,) -> one a prompt, in the order of the prompts' numbers. prompts: of each image."""
    _, place = np.unique(np.asarray(prompts), return_inverse=True)
    return np.bincount(place, np.asarray(values, np.float64)) / np.bincount(place)


def paired_runs(one: Array, other: Array) -> tuple[Array, Array]:
    """The rows of two methods that stand against each other: (runs, …) each -> as many of both.

    Run k against run k, as they share a training seed; a single run stands against every run of the other.
    """
    runs = min(len(one), len(other)) if min(len(one), len(other)) > 1 else max(len(one), len(other))
    return _for_runs(one, runs), _for_runs(other, runs)


def _for_runs(rows: Array, runs: int) -> Array:
    return np.repeat(rows, runs, axis=0) if len(rows) == 1 else rows[:runs]


def wins(one: Array, other: Array) -> Array:
    """Where the first is higher: 1, where both are equal: a half, else 0. Shapes as given."""
    return np.where(one > other, 1.0, np.where(one == other, 0.5, 0.0))


def estimates(samples: Sequence[Array], seed: int = 0) -> list[Estimate]:
    """The mean of each sample (runs, prompts), all under the same resamples of the prompts. n: prompts.

    One run: the percentile bootstrap of estimate(). Several training runs: prompts and runs are crossed, and the interval is
    for the mean over other prompts *and* other training seeds, see run_effects(). A method that was trained once has an
    interval for other prompts only.
    """
    means = _resampled_means(np.concatenate(samples), seed)  # (runs of all, resamples)
    found, start = [], 0
    for sample in samples:
        rows = means[start : start + len(sample)]
        start += len(sample)
        draws = rows.mean(0) + run_effects(sample.mean(1), rows, seed)
        low, high = np.quantile(draws, QUANTILES)
        found.append(Estimate(float(sample.mean()), float(low), float(high), sample.shape[1]))
    return found


def win_rates(samples: Sequence[Array], seed: int = 0) -> list[Estimate]:
    """Shares of prompts won from samples of wins (runs, prompts), with intervals within 0 and 1.

    Two prompts won and two lost are added before resampling: else who has won none would be certain never to win one.
    Source: Agresti and Coull, Approximate is better than "exact" (1998), on shares; here for halves and runs too.
    """
    padded = [np.concatenate([sample, np.tile([1.0, 1.0, 0.0, 0.0], (len(sample), 1))], axis=1) for sample in samples]
    found = []
    for sample, around in zip(samples, estimates(padded, seed), strict=True):
        value = float(sample.mean())
        found.append(Estimate(value, max(0.0, min(value, around.low)), min(1.0, max(value, around.high)), sample.shape[1]))
    return found


def run_effects(values: Array, replicates: Array, seed: int = 0) -> Array:
    """What other training seeds would do to a mean over runs: draws (resamples,), zeros for a single run.

    values (runs,), replicates (runs, resamples) of them under resampled prompts. Runs are too few to be resampled too: where
    seeds matter most, the percentile interval of three resampled runs covers the truth three times out of four. So their part
    is drawn from Student's t with runs - 1 degrees of freedom, times the standard error of the mean over runs. How far runs
    lie apart only because their images do is in the replicates already and is subtracted (variance components by analysis of
    variance, none below zero). In simulations with three runs the intervals covered 90 to 96 %.
    Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 4; on resampling both ways, Owen, The
    pigeonhole bootstrap (2007).
    """
    runs, resamples = replicates.shape
    if runs == 1:
        return np.zeros(resamples)
    noise = (replicates - replicates.mean(0)).var(1).sum() / (runs - 1)
    error = np.sqrt(max(0.0, values.var(ddof=1) - noise) / runs)
    return error * np.random.default_rng((seed, RUNS, runs)).standard_t(runs - 1, resamples)


def set_estimate(values: Array, replicates: Array, n: int, seed: int = 0) -> Estimate:
    """A score of a whole set of n images, or a difference of two: values (runs,), replicates (runs, resamples).

    A distance between sets grows when images are drawn twice, so only the replicates' spread is used: the interval is
    value + (quantiles of replicates - their mean).
    """
    draws = replicates.mean(0) + run_effects(values, replicates, seed)
    low, high = np.quantile(draws, QUANTILES) - replicates.mean()
    return Estimate(float(values.mean()), float(values.mean() + low), float(values.mean() + high), n)


def sign_flip_tests(samples: Sequence[Array], seed: int = 0) -> list[float]:
    """Two-sided p of each sample of differences (runs, prompts): were the two methods' names exchangeable in every prompt?

    The signs of the prompts' differences (means over runs) are flipped at random; p is how often the mean is as far from zero.
    Right for any distribution, also for few and coarse differences, where a bootstrap is too sure. It is about these runs.
    Source: Fisher, The Design of Experiments (1935), section 21; plus one: Phipson and Smyth (2010).
    """
    prompts = np.stack([sample.mean(0) for sample in samples])  # (samples, prompts)
    null = np.concatenate([_product(signs, prompts) for signs in _signs(prompts.shape[1], seed)], axis=1)
    return [_tail(row.mean(), draws) for row, draws in zip(prompts, null, strict=True)]


def set_test(values: Array, replicates: Array, seed: int = 0) -> float:
    """Two-sided p of a difference of set scores, shapes as in set_estimate.

    Such a difference has no part for each prompt to flip, and few replicates, so it is held against a normal distribution with
    their spread. It is about these runs.
    """
    null = replicates.mean(0).std() * np.random.default_rng((seed, NORMAL)).standard_normal(FLIPS)
    return _tail(float(values.mean()), null)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of one family -> corrected, in the same order: the chance of a single false claim in the family stays below p.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = np.argsort(p, kind="stable")
    corrected = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    found = np.empty(len(p))
    found[order] = np.minimum(1, np.maximum.accumulate(corrected))
    return [float(value) for value in found]


def _tail(value: float, null: Array) -> float:
    """How many of the null's draws lie as far from zero as the value; the value itself counts as one of them."""
    beyond = np.abs(null) >= abs(value) * (1 - 1e-9)  # equal but for rounding is equal
    return float((1 + beyond.sum()) / (1 + len(null)))


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
    """How often each of n items is drawn in each resample, in blocks (resamples, n); kept where they are small."""
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
