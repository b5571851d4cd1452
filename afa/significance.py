"""p-values of paired differences: by flipping signs, by analysis of variance, and Holm's correction of many.

benchmarks/intervals.py simulates how often these tests are wrong.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from afa.stats import BLOCK, RESAMPLES, SEVERAL, Array, blocks, weighted_means

FLIPS = 50_000  # sign flips; more than resamples, since Holm's correction needs small p
SIGNS, NORMAL, STUDENT = 2, 3, 4  # streams of random numbers, apart from those of afa.stats


def difference_tests(samples: Sequence[Array], seed: int = 0) -> list[float]:
    """Two-sided p of each sample of paired differences, for Holm's correction.

    samples: (runs, prompts) each
    seed:    of the random flips
    Returns one p a sample. One or two runs: the sign-flip p, which is about these trained models. From
    SEVERAL runs on: the larger of that and the p of crossed_test(), which is about other training seeds too.
    Raises ValueError for values that are not finite.
    """
    flipped = sign_flip_tests(samples, seed)
    several = [len(sample) >= SEVERAL and sample.shape[1] > 1 for sample in samples]
    return [
        max(p, crossed_test(sample, seed)) if more else p
        for p, sample, more in zip(flipped, samples, several, strict=True)
    ]


def sign_flip_tests(samples: Sequence[Array], seed: int = 0) -> list[float]:
    """Two-sided sign-flip p of each sample of paired differences; it is about these trained models.

    The signs of the prompts' differences (means over runs) are flipped: in all ways where these are at most
    FLIPS, else at random. p is how often the mean is then at least as far from zero. This is right for any
    distribution, also for few and coarse differences, where a bootstrap is too sure.
    samples: (runs, prompts) each, all of the same prompts
    seed:    of the random flips
    Returns one p a sample.
    Raises ValueError for values that are not finite.
    Source: Fisher, The Design of Experiments (1935), section 21; plus one: Phipson and Smyth (2010).
    """
    prompts = np.stack([sample.mean(0) for sample in samples])  # (samples, prompts)
    _check_finite(prompts)
    if 2 ** prompts.shape[1] <= FLIPS:
        ways = np.asarray(list(itertools.product((-1, 1), repeat=prompts.shape[1])), np.int8)
        return [
            float(_beyond(row.mean(), draws).mean())
            for row, draws in zip(prompts, weighted_means(ways, prompts), strict=True)
        ]
    flipped = [weighted_means(signs, prompts) for signs in _signs(prompts.shape[1], seed)]
    null = np.concatenate(flipped, axis=1)
    return [_tail(row.mean(), draws) for row, draws in zip(prompts, null, strict=True)]


def crossed_test(sample: Array, seed: int = 0) -> float:
    """Two-sided p of no mean difference among other prompts *and* other training seeds.

    Analysis of variance with prompts and seeds crossed, both random: the mean's variance has the error term
    MS_prompts + MS_seeds - MS_rest with Satterthwaite's degrees of freedom. Seeds that lie no further apart
    than the rest count as equal.
    sample: (runs, prompts) differences
    seed:   of the draws from Student's t
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
    """Two-sided p of a difference between two scores of whole sets.

    Such a difference has no part for each prompt that could be flipped, and few replicates. So it is compared
    with a normal distribution that has the replicates' spread; this is about these trained models. From
    SEVERAL runs on, the result is the larger of that p and the p of Student's t with the spread of the runs
    added, as in crossed_test().
    values:     (runs,) differences
    replicates: (runs, resamples) the same under resampled prompts
    n:          number of prompts that were resampled
    seed:       of the draws
    Raises ValueError for values that are not finite.
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
    """The share of the null's draws at least as far from zero as the value, which counts as a draw itself."""
    return float((1 + _beyond(value, null).sum()) / (1 + len(null)))


def _beyond(value: float, null: Array) -> NDArray[np.bool_]:
    return np.abs(null) >= abs(value) * (1 - 1e-9)  # equal but for rounding is equal


def _student(value: float, parts: Sequence[tuple[float, int]], seed: int) -> float:
    """Two-sided p of a value whose variance is a sum of parts (mean square, degrees of freedom)."""
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


def _signs(n: int, seed: int) -> Iterator[NDArray[np.int8]]:
    """Random signs in blocks (flips, n)."""
    rng = np.random.default_rng((seed, SIGNS))
    for size in blocks(n, min(FLIPS, max(RESAMPLES, 12 * BLOCK // n))):
        yield (2 * rng.integers(2, size=(size, n), dtype=np.int8) - 1).astype(np.int8)
