"""What a report says of curves over several values of guidance or steps: sentences, tables, a plot."""

import math
from collections.abc import Sequence
from typing import Any

from afa.evaluation.compare import Analysis
from afa.evaluation.frontier import Frontier, Gap
from afa.evaluation.report.content import difference_cell, seconds_cell, value_cell
from afa.evaluation.report.headline import WORDS, Headline, figures
from afa.pages.frontier import FrontierLine, FrontierSpot, frontier_plot
from afa.pages.numbers import decimals, number, plural, with_interval
from afa.pages.tables import Shown, Table, TableRow

UNITS = {"guidance": "guidance", "steps": "denoising steps"}


def frontier_title(found: Frontier) -> str:
    """Return the title of a part of the report."""
    return f"{found.quality.metric} against {found.distance.metric}, by {UNITS[found.axis]}"


def frontier_headlines(one: Analysis) -> list[Headline]:
    """Return what the curves say about our method, a headline for each setting that has several values."""
    return [_headline(one, found) for found in one.frontiers if found.gaps]


def _headline(one: Analysis, found: Frontier) -> Headline:
    ours, metric, distance = one.title(str(one.ours)), found.quality.metric, found.distance.metric
    better = sum(gap.comparison is not None and gap.comparison.verdict == "better" for gap in found.gaps)
    others = plural(len(found.gaps), "other")
    values = ", ".join(_value(point.value) for point in found.lines[str(one.ours)])
    lead = (
        f"Over {UNITS[found.axis]} {values}, by {metric} at equal {distance}, the curve of {ours} is better"
        f" than {f'all {others}' if better == len(found.gaps) > 1 else f'{better} of {others}'}."
    )
    kinds = []
    for verdict in ("better", "undecided", "worse"):
        named = [
            f"{WORDS[verdict]} {one.title(gap.other)} ({figures(gap.comparison)}{_apart(one, found, gap)})"
            for gap in found.gaps
            if gap.comparison is not None and gap.comparison.verdict == verdict
        ]
        kinds += [(verdict.capitalize(), f"{'; '.join(named)}.")] if named else []
    none = [gap for gap in found.gaps if gap.comparison is None]
    if none:
        named = [f"{one.title(gap.other)} ({_apart(one, found, gap).removeprefix('; ')})" for gap in none]
        kinds.append(("Not compared", f"{'; '.join(named)}."))
    return Headline(metric, lead, kinds)


def _apart(one: Analysis, found: Frontier, gap: Gap) -> str:
    """Say how two curves lie that do not overlap, or that share no training seed; "" for others."""
    if math.isnan(gap.low):
        return "; no training seed is shared"
    if not gap.nearer:
        return ""
    further = gap.other if gap.nearer == one.ours else str(one.ours)
    ends = [
        _range(found, [found.distance.values[point.method].value for point in found.lines[name]])
        for name in (gap.nearer, further)
    ]
    but = "" if gap.comparison is not None else f", but its {found.quality.metric} is not better"
    return (
        f"; the curves do not overlap: {one.title(gap.nearer)} is nearer with all values,"
        f" {found.distance.metric} {ends[0]} and not {ends[1]}{but}"
    )


def _range(found: Frontier, values: Sequence[float]) -> str:
    places = decimals([found.distance.values[name] for name in found.lines])
    return f"{number(min(values), places)} to {number(max(values), places)}"


def gaps_table(one: Analysis, found: Frontier) -> Table | None:
    """Return how far our curve lies above each other; None if there is nothing to compare."""
    if not found.gaps:
        return None
    rows = []
    for gap in found.gaps:
        made, other = gap.comparison, one.methods[gap.other]
        shown = None if made is None else Shown(made.difference, signed=True, verdict=made.verdict)
        where = f"no overlap: {one.title(gap.nearer)} is nearer" if gap.nearer else None
        where = where or (None if math.isnan(gap.low) else _range(found, (gap.low, gap.high)))
        rows.append(TableRow([other.title, shown, where], other.group))
    quality, distance = found.quality.metric, found.distance.metric
    family = sum(gap.comparison is not None for curves in one.frontiers for gap in curves.gaps)
    note = (
        f"The mean difference in {quality} at equal {distance}, over the range that both curves have. What a"
        f" curve reaches at a {distance} is the best {quality} of all values that are at least as near to the"
        " real images, with straight lines between. Without a common range, the nearer curve is compared at"
        f" its best with the other, if it is also better; p is then the larger one of {quality} and"
        f" {distance}. Prompts are resampled for both metrics and both curves together; ▲ better, ▼ worse,"
        f" ○ undecided, after Holm's correction over {plural(family, 'comparison')} of curves."
    )
    return Table(
        [f"curve over {found.axis}", f"{one.title(str(one.ours))} minus it", f"{distance} from, to"],
        rows,
        note,
    )


def points_table(one: Analysis, found: Frontier) -> Table:
    """Return quality and distance of every point."""
    rows = []
    for name, points in found.lines.items():
        for point in points:
            method = one.methods[point.method]
            cells = [
                one.title(name),
                _value(point.value),
                value_cell(found.quality, method),
                value_cell(found.distance, method),
                difference_cell(found.quality, method.name, None if point.own else name),
                seconds_cell(one, method),
            ]
            rows.append(TableRow(cells, method.group, point.own))
    minus = f"{found.quality.metric} minus that at its own"
    headers = ["method", found.axis, found.quality.header, found.distance.header, minus, "seconds an image"]
    note = (
        "In bold: each method's own value, chosen on captions that are not judged, at which the main table"
        " stands. Differences are paired by prompt and not corrected for their number."
    )
    return Table(headers, rows, note)


def frontier_chart(one: Analysis, found: Frontier) -> str:
    """Draw the curves."""
    quality, distance = found.quality, found.distance
    lines = []
    for name, points in found.lines.items():
        spots = []
        for point in points:
            values = quality.values[point.method], distance.values[point.method]
            places = decimals([values[1]])
            tip = (
                f"{one.title(name)}, {found.axis} {_value(point.value)}: {quality.metric}"
                f" {with_interval(values[0], 3)}, {distance.metric} {with_interval(values[1], places)},"
                f" n = {values[0].n}"
            )
            spots.append(FrontierSpot(_value(point.value), values[0], values[1].value, tip, point.own))
        lines.append(FrontierLine(one.title(name), one.methods[name].group, spots))
    side = "right" if distance.note.higher_is_better else "left"
    described = f"{frontier_title(found)}, of {', '.join(line.title for line in lines)}"
    return frontier_plot(lines, (f"{distance.metric}, better to the {side}", quality.header), described)


def frontier_part(one: Analysis, found: Frontier) -> dict[str, Any]:
    """Return what the page shows of one setting."""
    return {
        "title": frontier_title(found),
        "drawn": frontier_chart(one, found),
        "groups": {one.methods[name].group for name in found.lines},
        "gaps": gaps_table(one, found),
        "points": points_table(one, found),
    }


def _value(value: float) -> str:
    return f"{value:.16g}"
