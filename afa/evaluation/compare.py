"""All comparisons of a report, computed from Results; p-values are corrected as one family."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from afa.errors import UserError
from afa.evaluation.columns import Column, Pair, compare, image_sample, make_column
from afa.evaluation.frontier import Frontier, find_frontiers
from afa.evaluation.results import GROUPS, Method, Results, prompts_of
from afa.significance import holm
from afa.stats import Estimate, estimates, least_items

OURS, BOUND, EXPERT = "ours", "bound", "expert"
RIVALS = ("merge", "sampling", "control")  # groups of what else could be done with the same experts
Key = tuple[object, ...]


@dataclass(frozen=True)
class Analysis:
    """One evaluation with everything computed.

    columns: by metric, primary ones first; metrics that no method has are left out
    family:  number of comparisons that were corrected together
    folder:  of results.json and the images; None if not given
    """

    results: Results
    columns: dict[str, Column]
    family: int = 0
    folder: Path | None = None

    @cached_property
    def methods(self) -> dict[str, Method]:
        return {method.name: method for method in self.results.methods}

    @cached_property
    def rows(self) -> list[Method]:
        """Return the rows of the main table, group by group."""
        return sorted(main_methods(self.results), key=lambda method: GROUPS.index(method.group))

    @cached_property
    def primary(self) -> list[Column]:
        """Return the metrics that claims are about: those marked primary, else the first."""
        columns = list(self.columns.values())
        return [column for column in columns if column.note.primary] or columns[:1]

    @property
    def lead(self) -> Column:
        """Return the metric of the main table."""
        return self.primary[0]

    @cached_property
    def ours(self) -> str | None:
        return our_method(self.results)

    @cached_property
    def frontiers(self) -> list[Frontier]:
        """Return the curves over several values of guidance or steps."""
        kinds = {column.note.kind: column for column in reversed(self.primary)}
        return find_frontiers(self.results, kinds.get("image"), kinds.get("set"), self.ours)

    @cached_property
    def problems(self) -> list[str]:
        """Return what the report lacks: failed metrics and methods, and runs with unusable values."""
        unused = [
            f"{column.metric} of {method.title}, training seed {run.seed}: "
            "some values are missing or no numbers"
            for column in self.columns.values()
            for method in self.results.methods
            for run in method.runs
            if (column.metric in run.scores or column.metric in run.sets)
            and (method.name, run.seed) not in column.by_run
        ]
        apart = [
            f"{column.metric} of {self.title(one)} minus {self.title(other)}: they share no training seed"
            for column in self.columns.values()
            for one, other in _pairs(self.results, column)
            if (one, other) not in column.comparisons
        ]
        return [*self.results.errors, *unused, *apart]

    @cached_property
    def prompts(self) -> int:
        """Return the number of independent prompts; equal prompts count once."""
        return len(set(prompts_of(self.results.items)))

    @property
    def least(self) -> int:
        """Return how many prompts a verdict needs, corrected over the family."""
        return least_items(self.family)

    def title(self, name: str) -> str:
        """Return a method's title."""
        return self.methods[name].title

    def group(self, *groups: str) -> list[str]:
        """Return the names of the main table's rows in some groups."""
        return [method.name for method in self.rows if method.group in groups]

    @cached_property
    def seconds(self) -> dict[str, Estimate]:
        """Return seconds per image, by method. Images of one batch share their time."""
        prompts = prompts_of(self.results.items)
        timed = {method.name: image_sample(method, prompts) for method in self.results.methods}
        known = {name: sample.scores for name, sample in timed.items() if sample is not None}
        whole = {name: scores for name, scores in known.items() if scores.shape[1] == len(set(prompts))}
        return dict(zip(whole, estimates(list(whole.values())), strict=True)) if whole else {}


def analyse(several: Sequence[Results], folders: Sequence[Path | None] = ()) -> list[Analysis]:
    """Compute everything; p-values are corrected over all evaluations of the report together.

    The family: on each primary metric, our method and the best single expert against all other rows but
                bounds.
    Raises UserError for results that cannot be compared.
    """
    found = [_analyse(results) for results in several]
    family: dict[Key, float] = {}
    for place, one in enumerate(found):
        rivals = {method.name for method in one.rows if method.group != BOUND}
        for column in one.primary:
            compared = {pair: known.p for pair, known in column.comparisons.items() if set(pair) <= rivals}
            family |= {_key(place, column, pair): p for pair, p in compared.items()}
    corrected = dict(zip(family, holm(list(family.values())), strict=True))
    places = list(folders) or [None] * len(found)
    return [
        replace(
            one, columns=_corrected(one.columns, place, corrected), family=len(family), folder=places[place]
        )
        for place, one in enumerate(found)
    ]


def main_methods(results: Results) -> list[Method]:
    """Return the methods in the main table; the others belong to studies."""
    return [method for method in results.methods if not method.axes]


def our_method(results: Results) -> str | None:
    """Return the row that claims are about: `afa`, else the first of group ours by name;

    None if there is none.
    """
    ours = sorted(method.name for method in main_methods(results) if method.group == OURS)
    return "afa" if "afa" in ours else ours[0] if ours else None


def _analyse(results: Results) -> Analysis:
    """Return every column with its best expert, its values and its comparisons, not corrected yet."""
    _check(results)
    experts = [method.name for method in main_methods(results) if method.group == EXPERT]
    known = {}
    for name in sorted(results.metrics, key=lambda name: not results.metrics[name].primary):
        column = make_column(name, results.metrics[name], results.methods, results.items)
        if column.values:
            column = replace(column, best=column.leader(experts))
            known[name] = replace(column, comparisons=compare(column, _pairs(results, column)))
    if not known:
        raise UserError(
            "there is nothing to report: no method has a score; "
            "see the errors in results.json and run afa evaluate again"
        )
    return Analysis(results, known)


def _check(results: Results) -> None:
    """Raise UserError for results that cannot be compared."""
    names = [method.name for method in results.methods]
    if not names or not results.items or not results.metrics:
        raise UserError(
            "there is nothing to report: the results have no methods, images or metrics; "
            "run afa evaluate again"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two methods of the results are called '{twice}'; run afa evaluate again")
    for method in results.methods:
        if not method.runs:
            raise UserError(f"method '{method.name}' has no runs; run afa evaluate again")
        if method.group not in GROUPS:
            raise UserError(
                f"method '{method.name}' is of group '{method.group}', which is none of: {', '.join(GROUPS)}"
            )


def _pairs(results: Results, column: Column) -> list[Pair]:
    """Return the pairs to compare: methods with the best expert and with ours, variants with their origin."""
    main = [method.name for method in main_methods(results) if method.name in column.values]
    references = [name for name in (column.best, our_method(results)) if name in column.values]
    pairs = [(name, other) for other in references if other is not None for name in main if name != other]
    derived = [
        (method.name, method.of)
        for method in results.methods
        if method.axes and {method.name, method.of} <= set(column.values)
    ]
    return list(dict.fromkeys([*pairs, *derived]))


def _key(place: int, column: Column, pair: Pair) -> Key:
    """Return a key that is the same for both directions of a comparison."""
    return (place, column.metric, *sorted(pair))


def _corrected(columns: dict[str, Column], place: int, corrected: dict[Key, float]) -> dict[str, Column]:
    """Return the columns of one evaluation with the corrected p-values of the family.

    place: of the evaluation in the report
    """
    found, least = {}, least_items(len(corrected))
    for name, column in columns.items():
        comparisons = {
            pair: replace(known, p_holm=corrected.get(_key(place, column, pair)), least=least)
            for pair, known in column.comparisons.items()
        }
        found[name] = replace(column, comparisons=comparisons)
    return found
