"""Studies: how a score changes with the number of steps or experts, and what each part of the ensemble is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

from afa.evaluation.compare import Analysis
from afa.evaluation.report.content import arrow, difference_cell, parameters_cell, seconds_cell
from afa.evaluation.report.tables import Row, Shown, Table
from afa.evaluation.results import Method
from afa.evaluation.statistics import Estimate

TITLES = {
    "steps": "Quality against steps",
    "experts": "Quality against the number of experts",
    "variant": "Ablations",
    "objective": "Objectives, further steps by each",
}


@dataclass(frozen=True)
class Point:
    """One method at one place of an axis. main: whether it is a row of the main table, with no axes of its own."""

    place: float | str
    method: Method
    value: Estimate
    main: bool = False


@dataclass(frozen=True)
class Study:
    """Methods along one axis. lines: by what they were derived from. numeric: whether the axis is of numbers."""

    axis: str
    lines: dict[str, list[Point]]
    numeric: bool

    @property
    def title(self) -> str:
        return TITLES.get(self.axis, f"Quality against {self.axis}")


def find_studies(one: Analysis) -> list[Study]:
    """One for each axis, in the order of TITLES, of the methods that have a value of the leading metric."""
    known = [method for method in one.results.methods if method.axes and method.name in one.lead.values]
    axes = sorted({_axis(method) for method in known}, key=lambda axis: ([*TITLES, axis].index(axis), axis))
    return [_study(one, axis, [method for method in known if _axis(method) == axis]) for axis in axes]


def study_table(one: Analysis, study: Study) -> Table:
    """Its points: the value, the difference to what each was derived from, the cost."""
    rows = [Row(_cells(one, study, point), point.method.group, point.main) for points in study.lines.values() for point in points]
    headers = [
        "method" if study.numeric else study.axis,
        *([study.axis] if study.numeric else []),
        f"{one.lead.metric} {arrow(one.lead)}",
        "minus the main table's" if _all_main(one, study) else "minus what it is compared with",
        "trained parameters",
        "seconds an image",
    ]
    note = (
        "Differences are paired by prompt and compare runs of the same training seeds; they are not corrected for their number."
    )
    return Table(headers, rows, f"{note} In bold: as in the main table." if any(row.strong for row in rows) else note)


def _all_main(one: Analysis, study: Study) -> bool:
    """Whether every point was derived from a row of the main table."""
    return not any(of in one.methods and one.methods[of].axes for of in study.lines)


def _axis(method: Method) -> str:
    return next((axis for axis in TITLES if axis in method.axes), next(iter(method.axes)))


def _study(one: Analysis, axis: str, methods: Sequence[Method]) -> Study:
    numeric = all(isinstance(method.axes[axis], (int, float)) for method in methods)
    lines = {of: [method for method in methods if method.of == of] for of in dict.fromkeys(method.of for method in methods)}
    return Study(axis, {of: _points(one, axis, of, line, numeric) for of, line in lines.items()}, numeric)


def _points(one: Analysis, axis: str, of: str, methods: Sequence[Method], numeric: bool) -> list[Point]:
    points = [
        Point(method.axes[axis] if numeric else str(method.axes[axis]), method, one.lead.values[method.name])
        for method in methods
    ]
    main = _place_of_main(one, axis) if numeric else "as it is"
    if main is not None and of in one.lead.values and not one.methods[of].axes:
        points.insert(0, Point(main, one.methods[of], _value_of_main(one, of, methods), main=True))
    return sorted(points, key=lambda point: float(point.place)) if numeric else points


def _value_of_main(one: Analysis, of: str, methods: Sequence[Method]) -> Estimate:
    """The main row's value; of the one training seed that a study looks at, where it looks at one."""
    seeds = {run.seed for method in methods for run in method.runs}
    return one.lead.by_run.get((of, seeds.pop()), one.lead.values[of]) if len(seeds) == 1 else one.lead.values[of]


def _place_of_main(one: Analysis, axis: str) -> float | None:
    """Where the rows of the main table stand on an axis, as far as the protocol says."""
    if axis == "steps":
        steps = one.results.protocol.get("steps")
        return steps if isinstance(steps, (int, float)) else None
    return len(one.results.experts) or None if axis == "experts" else None


def _cells(one: Analysis, study: Study, point: Point) -> list[Shown | str | None]:
    of, method = point.method.of or point.method.name, point.method
    title = one.title(of) if of in one.methods and study.axis != "experts" else method.title
    names = [title, f"{point.place:g}"] if study.numeric else [f"{title}, {point.place}"]
    if of in one.methods and one.methods[of].axes:  # compared with another row of the study
        names = [f"{method.title} (with {one.methods[of].title})"]
    return [
        *names,
        Shown(point.value),
        difference_cell(one.lead, method.name, of),
        parameters_cell(method),
        seconds_cell(one, method),
    ]
