"""The tables of a report, from an analysis."""

from collections.abc import Callable, Sequence
from functools import partial

from afa.evaluation.columns import Column
from afa.evaluation.compare import Analysis
from afa.evaluation.report.numbers import count, decimals, durations, number, plural
from afa.evaluation.report.tables import Cell, Row, Shown, Table
from afa.evaluation.results import GROUPS, Method
from afa.evaluation.statistics import PADDED, RESAMPLES, SEVERAL
from afa.shareable import public_place

Maker = tuple[str, Callable[[Method], Cell]]  # a column: its header, and the cell of a method
COMPUTED = {
    "intervals": (
        f"95 %, bootstrap of {count(RESAMPLES)} resamples of the prompts, the same for every method; the images of a prompt are"
        f" averaged first, wherever it stands in the list. Below {PADDED} prompts two pseudo-prompts are added. From {SEVERAL} training"
        " seeds on their spread is added (Student's t); with fewer, an interval is for other prompts, of these trained models. A"
        " score of a whole set has the replicates that were made with it, and its interval is for this number of images."
    ),
    "tests": (
        "two-sided: the signs of the prompts' differences are flipped; scores of sets against a normal distribution. From"
        f" {SEVERAL} training seeds on the larger of that p and the p of an analysis of variance with prompts and seeds crossed."
        " Runs are paired by training seed."
        " Holm's correction over all claims of the report: our method and the best single expert against every other row, by the"
        " leading metrics."
    ),
}
GROUP_TITLES = {
    "expert": "Experts",
    "merge": "Merges",
    "sampling": "Combined while sampling",
    "control": "Controls",
    "ours": "Ours",
    "bound": "Upper bounds",
}


def title(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """The report's name."""
    ours, on = sorted({one.title(one.ours) for one in several if one.ours is not None}), " and ".join(names)
    whose = "its" if len(ours) == 1 else "their"
    return f"{' and '.join(ours)} and {whose} rivals, on {on}" if ours else f"Comparison on {on}"


def main_table(one: Analysis, column: Column, brief: bool = False) -> Table:
    """Value, differences, win rate and cost of every row, by a leading metric. brief: as narrow as a terminal."""
    found = {seeds_cell(column, method) for method in one.rows} - {None}
    told = len(found) == 1 and str(next(iter(found))).isdecimal()  # then the note says it in fewer letters
    seeds = [("seeds", partial(seeds_cell, column))] if found and not (brief and told) else []
    columns = [*_scored(one, column, brief), *seeds, ("seconds an image", lambda method: seconds_cell(one, method))]
    columns += [] if brief else [("memory", memory), ("trained parameters", parameters_cell)]
    return _table(one, columns, _main_note(one, column))


def metrics_table(one: Analysis) -> Table:
    """Every metric of every row."""
    columns = [(f"{column.metric} {arrow(column)}", partial(_value, column)) for column in one.columns.values()]
    leading = " and ".join(column.metric for column in one.primary)
    claims = f"Claims are made about {leading} only; intervals of the others are not corrected."
    return _table(one, columns, f"↑ higher is better, ↓ lower is better. {claims}")


def runs_table(one: Analysis) -> Table | None:
    """Every training run alone; None if nothing was trained more than once."""
    rows = [
        Row([method.title, str(run.seed), *(_of_run(column, method.name, run.seed) for column in one.primary)], method.group)
        for method in one.rows
        if len(method.runs) > 1
        for run in method.runs
    ]
    note = (
        "Intervals of a single run are over prompts only; how far the runs of a method lie apart is what its own interval adds."
    )
    return (
        Table(["method", "training seed", *(f"{column.metric} {arrow(column)}" for column in one.primary)], rows, note)
        if rows
        else None
    )


def training_table(one: Analysis) -> Table | None:
    """Parameters, steps and time of what was trained; a study of sampling steps trains nothing of its own."""
    trained = [method for method in one.results.methods if method.trained_parameters and "steps" not in method.axes]
    trained.sort(key=lambda method: GROUPS.index(method.group))
    rows = [Row(_training_cells(one, method), method.group, method.name == one.ours) for method in trained]
    note = "Time is the mean over runs [shortest, longest]."
    return Table(["method", "trained parameters", "training steps", "time", "runs"], rows, note) if rows else None


def overview_table(several: Sequence[Analysis], names: Sequence[str]) -> Table:
    """The leading metric of every evaluation side by side. names: of the evaluations."""
    methods = {method.name: method for one in several for method in one.rows}
    ours = {one.ours for one in several}
    rows = [
        Row([method.title, *(_value(one.lead, method) for one in several)], method.group, method.name in ours)
        for method in sorted(methods.values(), key=lambda method: GROUPS.index(method.group))
    ]
    headers = [f"{name}: {one.lead.metric} {arrow(one.lead)}" for name, one in zip(names, several, strict=True)]
    return Table(["method", *headers], rows)


def made_of(one: Analysis) -> list[tuple[str, str]]:
    """How the evaluation was made, as pairs of words."""
    results = one.results
    asked = {"training_seeds": "training seeds asked for"}  # how many there are, the tables say
    protocol = [(asked.get(name, name.replace("_", " ")), _words(value)) for name, value in results.protocol.items() if value is not None]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    metrics = [(f"metric {name}", note.source) for name, note in results.metrics.items()]
    experts = [(f"expert {entry.get('name', '?')}", _source(entry)) for entry in results.experts]
    notes = [(f"method {method.title}", method.note) for method in one.rows if method.note]
    pairs = [*protocol, *metrics, *COMPUTED.items(), *experts, *notes, ("versions", versions), ("machine", results.machine)]
    return [(name, words) for name, words in pairs if words]


def arrow(column: Column) -> str:
    """Which way is better."""
    return "↑" if column.note.higher_is_better else "↓"


def memory(method: Method) -> str | None:
    """The largest of its runs."""
    known = [run.memory_mb for run in method.runs if run.memory_mb is not None]
    if not known:
        return None
    return f"{number(max(known) / 1000, 2)} GB" if max(known) >= 1000 else f"{number(max(known), 0)} MB"


def difference_cell(column: Column, name: str, other: str | None) -> Cell:
    """name - other, with the verdict where there is one."""
    found = column.against(name, other)
    return None if found is None else Shown(found.difference, signed=True, verdict=found.verdict)


def seconds_cell(one: Analysis, method: Method) -> Cell:
    """Seconds an image."""
    return Shown(one.seconds[method.name], coarse=True) if method.name in one.seconds else None


def seeds_cell(column: Column, method: Method) -> Cell:
    """How many training seeds a value rests on; too few to show their spread: each of them."""
    sample = column.samples.get(method.name)
    if sample is None or not method.is_trained:
        return None
    many, lost = len(sample.seeds), len(method.runs) - len(sample.seeds)
    apart = decimals([column.values[method.name]])
    values = ", ".join(number(value, apart) for value in sample.means()) if 1 < many < SEVERAL else ""
    return f"{many}{f' of {len(method.runs)}' if lost else ''}{f' ({values})' if values else ''}"


def parameters_cell(method: Method) -> Cell:
    """How many were trained; nothing where nothing was."""
    return count(method.trained_parameters) if method.trained_parameters else None


def _table(one: Analysis, columns: Sequence[Maker], note: str) -> Table:
    """Every row of the main table, its title and then these columns."""
    rows = [Row([row.title, *(cell(row) for _, cell in columns)], row.group, row.name == one.ours) for row in one.rows]
    return Table(["method", *(header for header, _ in columns)], rows, note)


def _scored(one: Analysis, column: Column, brief: bool) -> list[Maker]:
    """The value, then the differences to the best single expert and to our method, then who won more prompts."""
    best, ours = column.best, one.ours if one.ours in column.values else None
    columns: list[Maker] = [(f"{column.metric} {arrow(column)}", partial(_value, column))]
    columns += [(f"minus {one.title(name)}", partial(_minus, column, name)) for name in (best, ours) if name is not None]
    if best is not None and column.note.kind == "image" and not brief:
        columns.append((f"won against {one.title(best)}", partial(_wins, column, best)))
    return columns


def _value(column: Column, method: Method) -> Cell:
    return Shown(column.values[method.name]) if method.name in column.values else None


def _of_run(column: Column, name: str, seed: int) -> Cell:
    return Shown(column.by_run[name, seed]) if (name, seed) in column.by_run else None


def _minus(column: Column, other: str, method: Method) -> Cell:
    return difference_cell(column, method.name, other)


def _wins(column: Column, other: str, method: Method) -> Cell:
    found = column.against(method.name, other)
    return None if found is None or found.wins is None else Shown(found.wins, share=True)


def _main_note(one: Analysis, column: Column) -> str:
    """What must be known to read the main table."""
    seeds = {len(column.samples[method.name].seeds) for method in one.rows if method.is_trained and method.name in column.samples}
    every = f"What was trained rests on {plural(max(seeds), 'seed')} each. " if len(seeds) == 1 else ""
    unit = "prompts, the images of a prompt together" if column.note.kind == "image" else "images, of seconds prompts"
    parts = [f"n counts {unit}; brackets are 95 % bootstrap intervals, differences are paired."]
    if column.best is not None:
        parts.append(f"{one.title(column.best)} is the best single expert on these same images, which favours it.")
    family = plural(one.family, "comparison")
    parts.append(f"▲ better, ▼ worse, ○ undecided, after Holm's correction over the {family} of this report.")
    if column.note.kind == "set":
        parts.append(f"A bracket is for this number of images: {column.metric} of more images would lie elsewhere.")
    if max(seeds, default=0) >= SEVERAL:
        parts.append(f"{every}From {SEVERAL} training seeds on intervals are for other prompts and seeds, all else for other prompts.")
    elif seeds:
        parts.append(
            f"{every}Intervals are for other prompts, of these trained models: other training seeds would spread further, which"
            f" fewer than {SEVERAL} do not show."
        )
    return " ".join(parts)


def _training_cells(one: Analysis, method: Method) -> list[Cell]:
    title = f"{one.title(method.of)}, {method.title}" if "variant" in method.axes and method.of in one.methods else method.title
    steps = count(method.training_steps) if method.training_steps else None
    seconds = durations(method.training_seconds) if method.training_seconds else None
    return [title, parameters_cell(method), steps, seconds, str(len(method.runs))]


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"


def _source(entry: dict[str, object]) -> str:
    files = entry.get("files", {})
    hashes = [f"{name} sha256 {digest}" for name, digest in files.items()] if isinstance(files, dict) else []
    return "; ".join([str(public_place(entry.get("source", ""))), *hashes])
