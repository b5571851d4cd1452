"""What the intervals and tests of a comparison are worth, by simulation: coverage and family-wise error, before and after.

    python benchmarks/intervals.py

"before" is the plain percentile bootstrap over prompts and the sign-flip test alone; "after" is what afa.stats
does: pseudo-prompts below 60, repeats averaged, from three training seeds on the larger of the sign-flip p and that of a
crossed analysis of variance. Prints Markdown, as it stands in docs/metrics.md; a rate of n simulations has its 95 % interval.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from afa import significance
from afa import stats as statistics
from afa.evaluation.columns import make_column
from afa.evaluation.frontier import find_frontiers
from afa.evaluation.results import Item, Method, MetricNote, Results, Run, SetScore
from afa.metrics.frechet import exact_replicates, frechet_distance, moments
from afa.significance import difference_tests, holm, sign_flip_tests
from afa.stats import SEVERAL, Estimate, _estimates, differences, estimates, prompt_draws

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator], Array]  # one sample, (runs, prompts)


def plain(samples: list[Array]) -> list[Estimate]:
    """The percentile bootstrap over prompts, nothing added."""
    return _estimates(samples, samples, 0)


def rate(hits: list[bool]) -> str:
    """A share with Wilson's 95 % interval."""
    n, share = len(hits), float(np.mean(hits))
    middle, half = (
        (share + 1.92 / n) / (1 + 3.84 / n),
        1.96 * np.sqrt(share * (1 - share) / n + 0.96 / n**2) / (1 + 3.84 / n),
    )
    return f"{share:.3f} [{max(0, middle - half):.3f}, {min(1, middle + half):.3f}]"


def covered(
    draw: Draw, truth: float, count: int, span: tuple[float, float] | None, of_differences: bool
) -> list[str]:
    """Coverage before and after, and how many intervals had no width."""
    rng = np.random.default_rng(0)
    samples = [draw(rng) for _ in range(count)]
    compute = differences if of_differences else estimates
    before, after = plain(samples), compute(samples, span=span)
    cells = []
    for found in (before, after):
        cells += [
            rate([one.low <= truth <= one.high for one in found]),
            f"{np.mean([one.low == one.high for one in found]):.3f}",
        ]
    return cells


def coverage(count: int) -> list[list[str]]:
    """One row a kind of score and number of prompts."""

    def six(right: float, n: int) -> Draw:
        return lambda rng: rng.binomial(6, right, (1, n)) / 6

    def one(right: float, n: int) -> Draw:
        return lambda rng: rng.binomial(1, right, (1, n)).astype(float)

    def normal(n: int) -> Draw:
        return lambda rng: rng.normal(0, 1, (1, n))

    def apart(n: int) -> Draw:
        return lambda rng: (rng.binomial(1, 0.99, (1, n)) - rng.binomial(1, 0.85, (1, n))).astype(float)

    rows = []
    for n in (6, 10, 20, 40, 60):
        rows += [
            ["one question, right in .95", n, *covered(one(0.95, n), 0.95, count, (0, 1), False)],
            ["six questions, right in .97", n, *covered(six(0.97, n), 0.97, count, (0, 1), False)],
            ["any number (normal)", n, *covered(normal(n), 0, count, None, False)],
            ["difference of two, right in .99 and .85", n, *covered(apart(n), 0.14, count, (-1, 1), True)],
        ]
    return [[row[0], str(row[1]), *row[2:]] for row in sorted(rows, key=lambda row: str(row[0]))]


def repeats(count: int) -> list[list[str]]:
    """30 prompts, five times over: prompts differ by .2, images of one by .1; taken for 150, and as they are."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        values = 0.2 * rng.normal(size=(1, 30)) + 0.1 * rng.normal(size=(5, 30))
        found.append((values.reshape(1, -1), values.mean(0)[None]))
    counted, averaged = ([pair[place] for pair in found] for place in (0, 1))
    false = [[p < 0.05 for p in sign_flip_tests(samples)] for samples in (counted, averaged)]
    cover = [[one.low <= 0 <= one.high for one in found] for found in (plain(counted), differences(averaged))]
    return [
        ["taken for 150 prompts", rate(cover[0]), rate(false[0])],
        ["as 30 prompts with 5 images each", rate(cover[1]), rate(false[1])],
    ]


def family(count: int, spread: float, prompts: int = 80, rivals: int = 20) -> list[list[str]]:
    """Our method, trained with several seeds, against rivals that are as good: how often a report gives any verdict that is false.

    Below three seeds verdicts are about the trained models: false is one that gets the sign of their own difference wrong.
    """
    rows = []
    for seeds in (1, 2, 3, 5):
        rng = np.random.default_rng(2)
        false: dict[str, list[bool]] = {"any": [], "after": []}
        for _ in range(count):
            level = spread * rng.normal(size=(seeds, 1))
            ours = level + 0.15 * rng.normal(size=(seeds, prompts))
            apart = [ours - 0.15 * rng.normal(size=(1, prompts)) for _ in range(rivals)]
            around = differences(apart)
            flips, crossed = (
                [one < 0.05 for one in holm(tests(apart))] for tests in (sign_flip_tests, difference_tests)
            )
            claims, careful = (
                [one.value for one, sure in zip(around, found, strict=True) if sure and one.excludes_zero]
                for found in (flips, crossed)
            )
            false["any"].append(bool(claims))
            wrong = [value * float(level.mean()) <= 0 for value in careful]
            false["after"].append(any(wrong) if seeds < SEVERAL else bool(careful))
        about = "these models" if seeds < SEVERAL else "other seeds, too"
        rows.append([str(seeds), f"{spread:g}", rate(false["any"]), rate(false["after"]), about])
    return rows


def curves(count: int, resamples: int = 200) -> list[list[str]]:
    """The gap between two curves of three values each, against the mean gap of all simulations with so many prompts.

    A value trades quality for distance; prompts are as hard, and as unlike real images, for all values and both methods.
    """
    reference = moments(np.random.default_rng(3).normal(size=(1000, 6)))
    settings = {"afa": [(0.60, 0.0), (0.70, 0.3), (0.75, 0.6)], "other": [(0.58, 0.1), (0.68, 0.4), (0.70, 0.7)]}
    notes = {"right": MetricNote("image", True, "", True), "distance": MetricNote("set", False, "", True)}
    rows = []
    for n in (20, 40, 160):
        rng, found = np.random.default_rng(n), []
        items, draws = [Item(index, str(index), index) for index in range(n)], prompt_draws(n, resamples)
        for _ in range(count):
            hard, shared = 0.15 * rng.normal(size=n), rng.normal(size=(n, 6))
            methods = []
            for name, points in settings.items():
                for place, (level, shift) in enumerate(points):
                    right = level + hard + 0.15 * rng.normal(size=n)
                    features = shift + 0.8 * shared + 0.6 * rng.normal(size=(n, 6))
                    replicates = exact_replicates(features, np.arange(n), reference, draws)
                    score = SetScore(frechet_distance(features, reference), replicates.tolist(), n)
                    axes = {"guidance": float(place)} if place else {}
                    run = Run(0, "", {"right": right.tolist()}, {"distance": score})
                    methods.append(Method(f"{name}{place or ''}", "ours", name, [run], axes, name if place else ""))
            own = {name: {"guidance": 0.0} for name in settings}
            results = Results({}, items, notes, methods, own=own)
            columns = [make_column(name, note, methods, items) for name, note in notes.items()]
            found.append(find_frontiers(results, *columns, "afa")[0].gaps[0].comparison)
        gaps = [one.difference for one in found if one is not None]
        truth = float(np.mean([gap.value for gap in gaps]))
        covered = rate([gap.low <= truth <= gap.high for gap in gaps])
        rows.append([str(n), f"{truth:.3f}", covered, str(count - len(gaps))])
    return rows


def table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--simulations", type=int, default=1000, help="for each row; a fifth of them for families"
    )
    count = parser.parse_args().simulations
    # Many simulations need fewer resamples than one report; both columns have the same.
    statistics.RESAMPLES = significance.RESAMPLES = 2000
    significance.FLIPS = 10_000
    print(f"Coverage of 95 % intervals over prompts, n = {count} simulations a row:\n")
    print(table(["score of a prompt", "prompts", "before", "no width", "after", "no width"], coverage(count)))
    print(f"\nA list of 30 prompts that stands five times in the file, n = {count // 2} simulations:\n")
    print(table(["counted", "coverage", "p < .05 without a difference"], repeats(count // 2)))
    few = count // 5
    print(
        f"\nFalse verdicts in a report of 20 comparisons after Holm's correction, 80 prompts, n = {few} simulations a row:\n"
    )
    headers = [
        "training seeds",
        "their spread",
        "said of other seeds by sign flips",
        "false now",
        "verdicts are about",
    ]
    print(table(headers, [row for spread in (0.0, 0.03) for row in family(few, spread)]))
    print(f"\nThe gap between two curves of three values, n = {few} simulations a row:\n")
    print(table(["prompts", "mean gap", "coverage", "no common range"], curves(few)))


if __name__ == "__main__":
    main()
