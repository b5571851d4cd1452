"""The report as one HTML file with its pictures inside; it has no scripts and loads nothing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from afa.evaluation.columns import Column
from afa.evaluation.compare import RIVALS, Analysis
from afa.evaluation.report.content import (
    Study,
    StudyPoint,
    find_studies,
    made_of,
    main_table,
    metrics_table,
    overview_table,
    runs_table,
    study_table,
    title,
    training_table,
)
from afa.evaluation.report.frontier import frontier_headlines, frontier_part
from afa.evaluation.report.headline import advice, headlines, terms
from afa.evaluation.results import Item, Method, image_name, prompts_of
from afa.images import open_image
from afa.pages import charts
from afa.pages.advice import Advice
from afa.pages.charts import Curve, ForestEntry, Spot
from afa.pages.numbers import decimals, number, plural, with_interval
from afa.pages.page import Advised, data_uri, render
from afa.pages.tables import Table

ROWS = 6  # prompts of the sheets
COLUMNS = 9  # methods beside our own in one sheet
CASES = 4  # wins, and losses
LARGEST = 224  # pixels of the longer side; images up to twice SHARP_UP_TO are kept as they are
SHARP_UP_TO = 96  # pixels; smaller images are shown with hard edges


def as_html(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """Return the whole page.

    names: of the evaluations; their pictures are read from the folders in the analyses
    """
    evaluations = [
        _evaluation(one, name, f"e{place}")
        for place, (one, name) in enumerate(zip(several, names, strict=True))
    ]
    overview = overview_table(several, names) if len(several) > 1 else None
    return render(
        "evaluation.html",
        heading=title(several, names),
        advice=evaluations[0]["advice"] if overview is None else _together(several, names),
        command="afa report",
        facts=evaluations[0]["facts"] if overview is None else "",
        docs="docs/metrics.md",
        overview=overview,
        evaluations=evaluations,
    )


def _together(several: Sequence[Analysis], names: Sequence[str]) -> Advised:
    """Return the advice of a page about several evaluations: one a line."""
    found = [advice(one) for one in several]
    if len({one.sentence for one in found}) == 1:
        return Advised(found[0])
    pairs = [(name, one.sentence) for name, one in zip(names, found, strict=True)]
    return Advised(Advice("It depends on what is asked for."), [("", pairs)])


def _evaluation(one: Analysis, name: str, key: str) -> dict[str, Any]:
    """Return the arguments of the macro `evaluation` in templates/evaluation.html."""
    pictures = Thumbnails(one.folder)
    costs = {
        "seconds an image": spots(one, "seconds"),
        "megabytes while drawing one image": spots(one, "memory"),
    }
    described = f"{one.lead.metric} of {{}} methods against {{}}"
    of_images = (column for column in one.columns.values() if column.note.kind == "image")
    chosen_by = next(of_images, None)  # primary columns come first
    return {
        "key": key,
        "name": name,
        "facts": _facts(one),
        "advice": Advised(
            advice(one),
            [(found.lead, found.kinds) for found in [*headlines(one), *frontier_headlines(one)]],
            terms(one),
        ),
        "groups": {method.group for method in one.rows},
        "main": [(column.metric, main_table(one, column)) for column in one.primary],
        "forests": [found for column in one.primary for found in _against_best(one, column)],
        "frontiers": [frontier_part(one, found) for found in one.frontiers],
        "metrics": metrics_table(one),
        "shown": plural(len(shown_items(one)), "prompt"),
        "sheets": sheets(one, pictures),
        "cases_by": chosen_by.metric if chosen_by else "",
        "cases": cases(one, chosen_by, pictures) if chosen_by else [],
        "costs": [
            (unit, charts.scatter(found, unit, one.lead.header, described.format(len(found), unit)))
            for unit, found in costs.items()
            if len(found) > 1
        ],
        "studies": [_study(one, study) for study in find_studies(one)],
        "training": training_table(one),
        "runs": runs_table(one),
        "errors": [*one.problems, *pictures.problems()],  # after the pictures, as some may not be there
        "made": made_of(one),
    }


def _facts(one: Analysis) -> str:
    """Return the protocol in one line."""
    protocol, items = one.results.protocol, one.results.items
    facts = [
        plural(len({item.prompt for item in items}), "prompt"),
        f"{plural(len(items), 'image')} a method",
    ]
    facts.append(plural(len(one.rows), "method"))
    facts += [f"{_values(protocol['steps'])} steps"] if "steps" in protocol else []
    facts += [f"guidance {_values(protocol['guidance'])}"] if protocol.get("guidance") is not None else []
    return ", ".join([*facts, "the same noise for every method"])


def _values(value: Any) -> str:
    """Return a setting of the protocol, or its several values, of which each method has its own."""
    return f"{', '.join(map(str, value))} (each method its own)" if isinstance(value, list) else str(value)


# --- charts ---


def _forest(
    column: Column, compared: Iterable[tuple[str, Method, str | None]], of: str, ours: str | None = None
) -> list[tuple[str, Table]]:
    """Return a caption and a table that draws differences; nothing if nothing was compared.

    compared: names of rows, their methods, and the method that each is compared with
    of:       title of that method
    """
    entries = []
    for name, method, other in compared:
        found = column.against(method.name, other)
        if found is not None:
            verdict = found.difference, found.verdict, found.p_holm
            entries.append(ForestEntry(name, method.group, *verdict, strong=method.name == ours))
    caption = f"{column.metric} minus that of {of}"
    return [(caption, charts.forest(entries, column.note.higher_is_better))] if entries else []


def _against_best(one: Analysis, column: Column) -> list[tuple[str, Table]]:
    """Draw every method minus the best single expert."""
    if column.best is None:
        return []
    rows = [(method.title, method, column.best) for method in one.rows]
    return _forest(column, rows, one.title(column.best), one.ours)


def spots(one: Analysis, what: str) -> list[Spot]:
    """Return all methods with a cost and a value of the leading metric. what: seconds or memory."""
    found = []
    for method in one.rows:
        seconds = one.seconds.get(method.name) if what == "seconds" else None
        memory = method.memory_mb if what == "memory" else None
        cost = seconds.value if seconds is not None else memory or 0.0
        if cost > 0 and method.name in one.lead.values:
            found.append(Spot(method.title, method.group, cost, seconds, one.lead.values[method.name]))
    return found


def _study(one: Analysis, study: Study) -> dict[str, Any]:
    """Draw curves if the axis is of numbers, else every variant minus the method that it comes from."""
    forests = []
    for of, points in study.lines.items() if not study.numeric else ():
        known = one.methods.get(of)
        origin = of if known is None else known.title
        rows = [(str(point.place), point.method, of) for point in points]
        forests += _forest(one.lead, rows, origin if known and known.axes else f"{origin} as it is")
    drawn = _curves(one, study) if study.numeric else None
    return {"title": study.title, "drawn": drawn, "forests": forests, "table": study_table(one, study)}


def _curves(one: Analysis, study: Study) -> str:
    """Draw a line for each method that others come from, and the level of the best single expert."""

    def drawn(name: str, point: StudyPoint) -> charts.CurvePoint:
        value = point.value
        tip = f"{name}, {point.place:g}: {with_interval(value, 3)}, n = {value.n}"
        return charts.CurvePoint(float(point.place), value.value, value.low, value.high, tip)

    lines = []
    for of, points in study.lines.items():
        name = one.title(of) if of in one.methods else of or study.axis
        lines.append(Curve(name, points[0].method.group, [drawn(name, point) for point in points]))
    best, axis = one.lead.best, "denoising steps" if study.axis == "steps" else study.axis
    level = (
        (f"{one.title(best)}, alone", one.lead.values[best])
        if best is not None and best not in study.lines
        else None
    )
    places = {point.x: charts.tick_label(point.x) for line in lines for point in line.points}
    described = f"{one.lead.metric} against {axis} for {', '.join(line.name for line in lines)}"
    return charts.curves(lines, places, axis, one.lead.header, described, level)


# --- pictures ---


@dataclass(frozen=True)
class Thumbnail:
    """An image inside the page.

    uri:   "" if the image could not be read
    words: a description for readers who cannot see it
    """

    uri: str
    words: str


class Thumbnails:
    """Reads the images of runs below a folder, each once. missing: paths that could not be read."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.missing: list[Path] = []
        self._known: dict[Path, str] = {}

    def available(self, method: Method) -> bool:
        """Return whether a method has images of its own."""
        return self.folder is not None and bool(method.runs[0].images)

    def of(self, method: Method, index: int, item: Item) -> Thumbnail:
        """Return the image of one item by a method's first run."""
        assert self.folder is not None
        path = self.folder / min(method.runs, key=lambda run: run.seed).images / image_name(index)
        if path not in self._known:
            try:
                self._known[path] = thumbnail(path)
            except (
                OSError,
                ValueError,
                SyntaxError,
            ):  # what Pillow raises for files that are not there, cut short, or no images
                self._known[path] = ""
                self.missing.append(path)
        return Thumbnail(self._known[path], f"{method.title}: {item.caption}")

    def problems(self) -> list[str]:
        """Return a sentence about images that could not be read, if there are any."""
        if not self.missing:
            return []
        found = f"{plural(len(self.missing), 'image')} could not be read (first: {self.missing[0]})"
        return [f"{found}; afa evaluate makes missing images again"]


def thumbnail(path: Path) -> str:
    """Return an image file as a WebP data URI: small ones without loss, large ones reduced."""
    picture = open_image(path)
    small = max(picture.size) <= 2 * SHARP_UP_TO
    if not small:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return data_uri(picture, "webp", lossless=small, quality=60 if small else 82, method=4)


def shown_items(one: Analysis) -> list[int]:
    """Return the index of the first image of each of the first prompts."""
    firsts: dict[int, int] = {}
    for index, item in enumerate(one.results.items):
        firsts.setdefault(item.prompt, index)
    return list(firsts.values())[:ROWS]


def sheets(one: Analysis, pictures: Thumbnails) -> list[dict[str, Any]]:
    """Return sheets of about the same width: a row for each prompt, a column for each method.

    Our method is in every sheet.
    """
    methods = [method for method in one.rows if pictures.available(method)]
    ours = [method for method in methods if method.name == one.ours]
    others = [method for method in methods if method.name != one.ours]
    count = max(1, math.ceil(len(others) / COLUMNS))
    ends = [round(len(others) * part / count) for part in range(count + 1)]
    found = []
    for columns in ([*ours, *others[start:end]] for start, end in pairwise(ends) if methods):
        items = [(index, one.results.items[index]) for index in shown_items(one)]
        rows = [(item, [pictures.of(method, index, item) for method in columns]) for index, item in items]
        found.append({"methods": columns, "rows": rows})
    return found


@dataclass(frozen=True)
class Case:
    """One item drawn by our method and another, with the scores of these two images."""

    index: int
    ours: float
    other: float


def cases(one: Analysis, column: Column, pictures: Thumbnails) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return titles and images: where our method is furthest ahead of, and behind, another.

    The others are the best expert and the best of all other methods.
    """
    if one.ours is None or one.ours not in column.values or not pictures.available(one.methods[one.ours]):
        return []
    places = decimals(list(column.values.values()))
    found = []
    for other in (column.best, column.leader(one.group(*RIVALS))):
        if other is None or not one.methods[other].runs[0].images:
            continue
        for words, chosen in zip(
            ("furthest ahead of", "furthest behind"), extreme_cases(one, column, other), strict=True
        ):
            shown = []
            for case in chosen:
                item, sides = one.results.items[case.index], []
                for method, score in ((one.methods[one.ours], case.ours), (one.methods[other], case.other)):
                    sides.append((method.title, pictures.of(method, case.index, item), number(score, places)))
                shown.append(
                    {"item": item, "sides": sides, "difference": number(case.ours - case.other, places, True)}
                )
            found.append((f"{one.title(one.ours)} {words} {one.title(other)}", shown))
    return found


def extreme_cases(one: Analysis, column: Column, other: str) -> tuple[list[Case], list[Case]]:
    """Return wins and losses, the largest first, at most one of a prompt; equal scores are neither.

    They are of the first training seed that both methods have.
    """
    found = column.against(str(one.ours), other)
    if found is None:
        return [], []

    def scores(method: Method) -> list[float]:
        run = next((run for run in method.runs if found.seeds and run.seed == found.seeds[0]), method.runs[0])
        return (run if method.is_trained else method.runs[0]).scores.get(column.metric, [])

    sign = 1 if column.note.higher_is_better else -1
    both = zip(scores(one.methods[str(one.ours)]), scores(one.methods[other]), strict=False)
    every = [Case(index, ours, theirs) for index, (ours, theirs) in enumerate(both)]
    every.sort(key=lambda case: (-sign * (case.ours - case.other), case.index))
    prompts = prompts_of(one.results.items)

    def first_of_prompts(chosen: Sequence[Case]) -> list[Case]:
        firsts: dict[int, Case] = {}
        for case in chosen:
            firsts.setdefault(prompts[case.index], case)
        return list(firsts.values())[:CASES]

    wins = [case for case in every if sign * (case.ours - case.other) > 0]
    losses = [case for case in reversed(every) if sign * (case.ours - case.other) < 0]
    return first_of_prompts(wins), first_of_prompts(losses)
