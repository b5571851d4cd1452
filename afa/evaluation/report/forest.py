"""Differences with their intervals, one under the other: a table whose middle column is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from afa.evaluation.columns import Comparison
from afa.evaluation.report.markup import figures, scrolling, verdict_mark
from afa.evaluation.report.numbers import decimals, interval, number, probability
from afa.evaluation.report.svg import SHAPES, Scale, line, scale, text, tick_label, ticks

HEIGHT = 26  # pixels of a row, as the style has it


@dataclass(frozen=True)
class Entry:
    """One row of the plot."""

    title: str
    group: str
    found: Comparison
    strong: bool = False


def forest(entries: Sequence[Entry], caption: str) -> str:
    """Rows from best to worst. caption: what the differences are of, and to what."""
    better = 1 if entries[0].found.higher_is_better else -1
    rows = sorted(entries, key=lambda entry: (-better * entry.found.difference.value, entry.title))
    ends = [end for entry in rows for end in (entry.found.difference.low, entry.found.difference.high)]
    across, places = scale([0.0, *ends], 0, 100), decimals([entry.found.difference for entry in rows])
    corrected = any(entry.found.p_holm is not None for entry in rows)
    body = "".join(_row(entry, across, places, corrected) for entry in rows) + _axis(across, corrected)
    head = f"<caption>{escape(caption)}</caption><thead><tr>{_head(better > 0, corrected)}</tr></thead>"
    return scrolling(f'<table class="forest">{head}<tbody>{body}</tbody></table>', caption)


def _head(higher: bool, corrected: bool) -> str:
    left, right = ("worse", "better") if higher else ("better", "worse")
    sides = f'<span class="sides"><span>← {left}</span><span>{right} →</span></span>'
    cells = ["method", sides, "difference <small>[95 %]</small>", *(["p <small>Holm</small>"] if corrected else [])]
    kinds = ["", "", ' class="num"', ' class="num"']
    return "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(cells, kinds, strict=False))


def _row(entry: Entry, across: Scale, places: int, corrected: bool) -> str:
    found, difference = entry.found, entry.found.difference
    numbers = figures(number(difference.value, places, True), interval(difference, places, True))
    cells = [f'<th scope="row">{escape(entry.title)}</th><td class="draw">{_drawn(entry, across)}</td>']
    cells.append(f'<td class="num">{numbers}{verdict_mark(found.verdict) if corrected else ""}</td>')
    if corrected:
        cells.append(f'<td class="num p">{"" if found.p_holm is None else probability(found.p_holm)}</td>')
    return f"<tr{' class=ours' if entry.strong else ''}>{''.join(cells)}</tr>\n"


def _drawn(entry: Entry, across: Scale) -> str:
    """Interval and value on the grid; places are in percent, so the drawing is as wide as its cell."""
    found = entry.found.difference
    low, value, high = (_percent(across, place) for place in (found.low, found.value, found.high))
    whisker = line(low, "50%", high, "50%", f"whisker {entry.group}")
    shape = f'<svg x="{value}" y="50%" overflow="visible" class="mark {entry.group}"><g>{SHAPES[entry.group]}</g></svg>'
    return f'<svg width="100%" height="{HEIGHT}" aria-hidden="true">{_grid(across)}{whisker}{shape}</svg>'


def _grid(across: Scale) -> str:
    places = [(_percent(across, tick), "grid" if tick else "zero") for tick in ticks(across)]
    return "".join(line(place, "0", place, "100%", kind) for place, kind in places)


def _axis(across: Scale, corrected: bool) -> str:
    labels = "".join(text(_percent(across, tick), "13", tick_label(tick), "tick", "middle") for tick in ticks(across))
    drawn = f'<td class="draw"><svg width="100%" height="18">{labels}</svg></td>'
    return f'<tr class="axis" aria-hidden="true"><td></td>{drawn}<td></td>{"<td></td>" if corrected else ""}</tr>'


def _percent(across: Scale, value: float) -> str:
    return f"{across(value):.2f}%"
