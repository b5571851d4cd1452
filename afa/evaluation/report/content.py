"""The tables of a report, from an analysis.

Every method, every metric, what was trained, and studies along an axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from afa.evaluation.columns import Column
from afa.evaluation.compare import Analysis
from afa.evaluation.results import GROUPS, Method
from afa.evaluation.settings import AXES
from afa.pages.numbers import count, decimals, durations, number, plural
from afa.pages.tables import Cell, Shown, Table, TableRow
from afa.places import public_place
from afa.stats import PADDED, RESAMPLES, SEVERAL, Estimate

COMPUTED = {
    "intervals": (
        f"95 %, bootstrap of {count(RESAMPLES)} resamples of the prompts, the same for every method; the"
        f" images of a prompt are averaged first, wherever it stands in the list. Below {PADDED} prompts two"
        f" pseudo-prompts are added. From {SEVERAL} training seeds on their spread is added (Student's t);"
        " with fewer, an interval is for other prompts, of these trained models. A score of a whole set has"
        " the replicates that were made with it, and its interval is for this number of images."
    ),
    "tests": (
        "two-sided: the signs of the prompts' differences are flipped; scores of sets against a normal"
        f" distribution. From {SEVERAL} training seeds on the larger of that p and the p of an analysis of"
        " variance with prompts and seeds crossed. Runs are paired by training seed. Holm's correction over"
        " all claims of the report: our method and the best single expert against every other row, by the"
        " leading metrics."
    ),
}
STUDY_TITLES = {
    "guidance": "Quality against guidance",
    "steps": "Quality against steps",
    "experts": "Quality against the number of experts",
    "variant": "Ablations",
    "objective": "Objectives, further steps by each",
}


def title(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """Return the report's title. names: of the evaluations."""
    ours, on = sorted({one.title(one.ours) for one in several if one.ours is not None}), " and ".join(names)
    whose = "its" if len(ours) == 1 else "their"
    return f"{' and '.join(ours)} and {whose} rivals, on {on}" if ours else f"Comparison on {on}"


# --- tables with a row a method ---


def main_table(one: Analysis, column: Column, brief: bool = False) -> Table:
    """Return value, differences, win rate and cost of every method, by a leading metric.

    brief: fewer columns, for the terminal
    """
    best, ours = column.best, one.ours if one.ours in column.values else None
    columns = {column.header: [value_cell(column, row) for row in one.rows], **own_columns(one)}
    for other in (best, ours):
        if other is not None:
            columns[f"minus {one.title(other)}"] = [
                difference_cell(column, row.name, other) for row in one.rows
            ]
    if best is not None and column.note.kind == "image" and not brief:
        against = [column.against(row.name, best) for row in one.rows]
        won = [
            None if found is None or found.wins is None else Shown(found.wins, share=True)
            for found in against
        ]
        columns[f"won against {one.title(best)}"] = won
    seeds = [seeds_cell(column, row) for row in one.rows]
    known = set(seeds) - {None}
    in_note = len(known) == 1 and str(next(iter(known))).isdecimal()
    if known and not (brief and in_note):
        columns["seeds"] = seeds
    columns["seconds an image"] = [seconds_cell(one, row) for row in one.rows]
    if not brief:
        columns["memory"] = [memory_cell(row) for row in one.rows]
        columns["trained parameters"] = [parameters_cell(row) for row in one.rows]
    return _by_method(one, columns, _main_note(one, column))


def metrics_table(one: Analysis) -> Table | None:
    """Return every metric of every method; None if there is only one metric, which the main table shows."""
    if len(one.columns) < 2:
        return None
    columns = {
        column.header: [value_cell(column, row) for row in one.rows] for column in one.columns.values()
    }
    leading = " and ".join(column.metric for column in one.primary)
    claims = f"Claims are made about {leading} only; intervals of the others are not corrected."
    return _by_method(one, columns, f"↑ higher is better, ↓ lower is better. {claims}")


def overview_table(several: Sequence[Analysis], names: Sequence[str]) -> Table:
    """Return the leading metric of every evaluation, side by side. names: of the evaluations."""
    methods = {method.name: method for one in several for method in one.rows}
    ours = {one.ours for one in several}
    rows = []
    for method in sorted(methods.values(), key=lambda method: GROUPS.index(method.group)):
        cells = [method.title, *(value_cell(one.lead, method) for one in several)]
        rows.append(TableRow(cells, method.group, method.name in ours))
    headers = [f"{name}: {one.lead.header}" for name, one in zip(names, several, strict=True)]
    return Table(["method", *headers], rows)


def runs_table(one: Analysis) -> Table | None:
    """Return the values of each training run; None if nothing was trained more than once."""
    runs = [(method, run.seed) for method in one.rows if len(method.runs) > 1 for run in method.runs]
    rows = []
    for method, seed in runs:
        found = [column.by_run.get((method.name, seed)) for column in one.primary]
        cells = [method.title, str(seed), *(value and Shown(value) for value in found)]
        rows.append(TableRow(cells, method.group))
    headers = ["method", "training seed", *(column.header for column in one.primary)]
    note = (
        "Intervals of a single run are over prompts only; how far the runs of a method lie apart is what its"
        " own interval adds."
    )
    return Table(headers, rows, note) if rows else None


def training_table(one: Analysis) -> Table | None:
    """Return parameters, steps and time of every training; other values of sampling have none."""
    trained = [
        method
        for method in one.results.methods
        if method.trained_parameters and not set(AXES) & method.axes.keys()
    ]
    rows = []
    for method in sorted(trained, key=lambda method: GROUPS.index(method.group)):
        derived = "variant" in method.axes and method.of in one.methods
        name = f"{one.title(method.of)}, {method.title}" if derived else method.title
        steps = count(method.training_steps) if method.training_steps else None
        seconds = durations(method.training_seconds) if method.training_seconds else None
        cells = [name, parameters_cell(method), steps, seconds, str(len(method.runs))]
        rows.append(TableRow(cells, method.group, method.name == one.ours))
    headers = ["method", "trained parameters", "training steps", "time", "runs"]
    return Table(headers, rows, "Time is the mean over runs [shortest, longest].") if rows else None


def _by_method(one: Analysis, columns: dict[str, list[Cell]], note: str) -> Table:
    """Return a table with a row for each method of the main table; its first column is the method's title.

    columns: header -> a cell for each method
    """
    rows = [
        TableRow([row.title, *cells], row.group, row.name == one.ours)
        for row, *cells in zip(one.rows, *columns.values(), strict=True)
    ]
    return Table(["method", *columns], rows, note)


def own_columns(one: Analysis) -> dict[str, list[Cell]]:
    """Return a column with each method's own value, for each setting that has several."""
    own, axes = one.results.own, {axis for values in one.results.own.values() for axis in values}
    columns: dict[str, list[Cell]] = {}
    for axis in sorted(axes):
        values = [own.get(row.name, {}).get(axis) for row in one.rows]
        columns[axis] = [None if value is None else f"{value:.16g}" for value in values]
    return columns


def _main_note(one: Analysis, column: Column) -> str:
    """Return the sentences that explain the main table."""
    trained = [method.name for method in one.rows if method.is_trained and method.name in column.samples]
    seeds = {len(column.samples[name].seeds) for name in trained}
    every = f"What was trained rests on {plural(max(seeds), 'seed')} each. " if len(seeds) == 1 else ""
    unit = (
        "prompts, the images of a prompt together"
        if column.note.kind == "image"
        else "images, and for seconds prompts"
    )
    parts = [f"n counts {unit}; brackets are 95 % bootstrap intervals, differences are paired."]
    if column.best is not None:
        parts.append(
            f"{one.title(column.best)} is the best single expert on these same images: the choice favours it."
        )
    own = own_columns(one)
    if own:
        parts.append(
            f"Every method is judged, and claims are made, at its own {' and '.join(own)}, chosen on captions"
            " that are not judged."
        )
    family = plural(one.family, "comparison")
    parts.append(f"▲ better, ▼ worse, ○ undecided, after Holm's correction over the {family} of this report.")
    if column.note.kind == "set":
        parts.append(
            f"An interval is for this number of images; {column.metric} of more images would be another."
        )
    if max(seeds, default=0) >= SEVERAL:
        others = "intervals are for other prompts and seeds, all else for other prompts"
        parts.append(f"{every}From {SEVERAL} training seeds on {others}.")
    elif seeds:
        parts.append(
            f"{every}Intervals are for other prompts, of these trained models: other training seeds would"
            f" spread further, which fewer than {SEVERAL} do not show."
        )
    return " ".join(parts)


# --- cells ---


def value_cell(column: Column, method: Method) -> Cell:
    """Return a method's score."""
    return Shown(column.values[method.name]) if method.name in column.values else None


def difference_cell(column: Column, name: str, other: str | None) -> Cell:
    """Return the score of one method minus that of another, with the verdict if there is one."""
    found = column.against(name, other)
    return None if found is None else Shown(found.difference, signed=True, verdict=found.verdict)


def seconds_cell(one: Analysis, method: Method) -> Cell:
    """Return the seconds of one image."""
    return Shown(one.seconds[method.name], coarse=True) if method.name in one.seconds else None


def memory_cell(method: Method) -> str | None:
    """Return the largest memory of a method's runs."""
    megabytes = method.memory_mb
    if megabytes is None:
        return None
    return f"{number(megabytes / 1000, 2)} GB" if megabytes >= 1000 else f"{number(megabytes, 0)} MB"


def seeds_cell(column: Column, method: Method) -> str | None:
    """Return the number of training seeds of a value; if they are few, also the value of each seed."""
    sample = column.samples.get(method.name)
    if sample is None or not method.is_trained:
        return None
    many, lost = len(sample.seeds), len(method.runs) - len(sample.seeds)
    apart = decimals([column.values[method.name]])
    values = ", ".join(number(value, apart) for value in sample.means()) if 1 < many < SEVERAL else ""
    return f"{many}{f' of {len(method.runs)}' if lost else ''}{f' ({values})' if values else ''}"


def parameters_cell(method: Method) -> str | None:
    """Return the number of trained parameters; None if nothing was trained."""
    return count(method.trained_parameters) if method.trained_parameters else None


# --- studies ---


@dataclass(frozen=True)
class StudyPoint:
    """One method at one place of an axis.

    main: whether it is a row of the main table, which has no axes
    """

    place: float | str
    method: Method
    value: Estimate
    main: bool = False


@dataclass(frozen=True)
class Study:
    """How the leading metric changes along an axis.

    lines:   points by the method that they were derived from
    numeric: whether the axis is of numbers
    """

    axis: str
    lines: dict[str, list[StudyPoint]]
    numeric: bool

    @property
    def title(self) -> str:
        return STUDY_TITLES.get(self.axis, f"Quality against {self.axis}")


def find_studies(one: Analysis) -> list[Study]:
    """Return a study for each axis, in the order of STUDY_TITLES, of methods with the leading metric."""
    by_axis: dict[str, list[Method]] = {}
    for method in one.results.methods:
        if method.axes and method.name in one.lead.values:
            axis = next((axis for axis in STUDY_TITLES if axis in method.axes), next(iter(method.axes)))
            by_axis.setdefault(axis, []).append(method)
    found = []
    for axis in sorted(by_axis, key=lambda axis: ([*STUDY_TITLES, axis].index(axis), axis)):
        methods = by_axis[axis]
        numeric = all(isinstance(method.axes[axis], (int, float)) for method in methods)
        names = dict.fromkeys(method.of for method in methods)
        lines = {
            of: _points(one, axis, of, [method for method in methods if method.of == of], numeric)
            for of in names
        }
        found.append(Study(axis, lines, numeric))
    return found


def _points(one: Analysis, axis: str, of: str, methods: Sequence[Method], numeric: bool) -> list[StudyPoint]:
    """Return the points of one line, with the main table's method that they come from if it has a place."""
    points = []
    for method in methods:
        place = method.axes[axis] if numeric else str(method.axes[axis])
        points.append(StudyPoint(place, method, one.lead.values[method.name]))
    main: float | str | None = None if numeric else "as it is"
    if axis in one.results.own.get(of, {}):
        main = one.results.own[of][axis]
    elif numeric and axis == "steps":
        steps = one.results.protocol.get("steps")
        main = steps if isinstance(steps, (int, float)) else None
    elif numeric and axis == "experts":
        main = len(one.results.experts) or None
    if main is not None and of in one.lead.values and not one.methods[of].axes:
        seeds = {
            run.seed for method in methods for run in method.runs
        }  # a study may look at one training seed only
        value = (
            one.lead.by_run.get((of, seeds.pop()), one.lead.values[of])
            if len(seeds) == 1
            else one.lead.values[of]
        )
        points.insert(0, StudyPoint(main, one.methods[of], value, main=True))
    return sorted(points, key=lambda point: float(point.place)) if numeric else points


def study_table(one: Analysis, study: Study) -> Table:
    """Return the points of a study: value, difference to the method that each comes from, cost."""
    rows = []
    for point in (point for points in study.lines.values() for point in points):
        of, method = point.method.of or point.method.name, point.method
        name = one.title(of) if of in one.methods and study.axis != "experts" else method.title
        names = [name, f"{point.place:g}"] if study.numeric else [f"{name}, {point.place}"]
        if of in one.methods and one.methods[of].axes:  # compared with another row of the study
            names = [f"{method.title} (with {one.methods[of].title})"]
        cells = [
            Shown(point.value),
            difference_cell(one.lead, method.name, of),
            parameters_cell(method),
            seconds_cell(one, method),
        ]
        rows.append(TableRow([*names, *cells], method.group, point.main))
    all_main = not any(of in one.methods and one.methods[of].axes for of in study.lines)
    headers = ["method", study.axis] if study.numeric else [study.axis]
    minus = "minus the main table's" if all_main else "minus what it is compared with"
    headers += [one.lead.header, minus]
    note = (
        "Differences are paired by prompt and compare runs of the same training seeds; they are not corrected"
        " for their number."
    )
    bold = " In bold: as in the main table." if any(row.strong for row in rows) else ""
    return Table([*headers, "trained parameters", "seconds an image"], rows, note + bold)


# --- how it was made ---


def made_of(one: Analysis) -> list[tuple[str, str]]:
    """Return how the evaluation was made, as pairs of a name and words."""
    results, pairs = one.results, []
    for name, value in results.protocol.items():
        name = (
            "training seeds asked for" if name == "training_seeds" else name.replace("_", " ")
        )  # the tables say how many there are
        words = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"
        pairs += [(name, words)] if value is not None else []
    pairs += [(f"metric {name}", note.source) for name, note in results.metrics.items()]
    pairs += COMPUTED.items()
    for entry in results.experts:
        files = entry.get("files", {})
        hashes = (
            [f"{name} sha256 {digest}" for name, digest in files.items()] if isinstance(files, dict) else []
        )
        source = "; ".join([str(public_place(entry.get("source", ""))), *hashes])
        pairs.append((f"expert {entry.get('name', '?')}", source))
    pairs += [(f"method {method.title}", method.note) for method in one.rows]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    pairs += [("versions", versions), ("machine", results.machine)]
    return [(name, words) for name, words in pairs if words]
