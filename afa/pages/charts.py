"""Plots as SVG: scatter, curves, and a table whose differences are drawn (forest plot).

Colours come from the page's style, by class. Every group of methods also has a shape of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from afa.pages.labels import LETTER, Box, place_labels, shortened, stacked, thinned, width_of
from afa.pages.numbers import MINUS, decimals, probability, with_interval
from afa.pages.tables import Cell, Shown, Table, TableRow

if TYPE_CHECKING:
    from afa.stats import Estimate

STAR = [
    (5.8 * size * math.sin(k * math.pi / 5), -5.8 * size * math.cos(k * math.pi / 5))
    for k in range(10)
    for size in (1 - 0.55 * (k % 2),)
]
SHAPES = {
    "expert": Markup('<circle r="4.4"/>'),
    "merge": Markup('<rect x="-4" y="-4" width="8" height="8"/>'),
    "sampling": Markup('<path d="M0-5.2 5 4.2H-5z"/>'),
    "control": Markup('<path d="M0-5.6 5.6 0 0 5.6-5.6 0z"/>'),
    "ours": Markup(f'<path d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in STAR)}z"/>'),
    "bound": Markup('<path class="open" d="M-4-4 4 4M-4 4 4-4"/>'),
}
# Whose labels of a scatter are placed first.
FIRST = ("ours", "expert", "control", "merge", "sampling", "bound")
TICK = 14  # letters under an axis
MARKED = 30  # points of a line, above which marks are smaller
APART = 5.0  # pixels between lines at one place, so that their intervals can be told apart
ROW = 26  # pixels: height of a row of a forest, as style.css has it
COLUMN = (250, 130)  # pixels: least width of its drawn column, and on a phone, as style.css has it


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from numbers to places.

    low, high:  of the data
    start, end: of the drawing, in pixels or percent
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(part) if self.log else part for part in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def scale(values: Sequence[float], start: float, end: float, log: bool = False, room: float = 0.05) -> Scale:
    """A scale around all values, with some room at both ends."""
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** room if high > low else 1.5
        return Scale(low / factor, high * factor, start, end, True)
    apart = (high - low) * room if high > low else abs(low) * 0.1 or 1.0
    return Scale(low - apart, high + apart, start, end)


def ticks(over: Scale, count: int = 6) -> list[float]:
    """About `count` round numbers within a scale: 1, 2 or 5 times a power of ten."""
    low, high = over.low, over.high
    if over.log:
        powers = [
            10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ]
        found: list[float] = []
        for sizes in ((1.0,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [
                round(size * power, 12) for power in powers for size in sizes if low <= size * power <= high
            ]
            if len(found) >= 4:
                return found
        return found or [low, high]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A number for an axis, as short as possible."""
    return f"{value:.6g}".replace("-", MINUS)


def text(x: float | str, y: float | str, words: str, kind: str = "label", anchor: str = "start") -> str:
    """A text element. kind: label, tick or axis."""
    return f'<text x="{_at(x)}" y="{_at(y)}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float | str, y1: float | str, x2: float | str, y2: float | str, kind: str) -> str:
    """A line element of a class: grid, zero, whisker, leader …"""
    return f'<line x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}" class="{kind}"/>'


def mark(x: float, y: float, group: str, tip: str, size: float = 1) -> str:
    """The shape of a group in its colour. tip: text under the pointer; size: a factor."""
    sized = "" if size == 1 else f" scale({size:.2f})"
    place = f'<g transform="translate({_at(x)} {_at(y)}){sized}" class="mark {group}">'
    return f"{place}<title>{escape(tip)}</title>{SHAPES[group]}</g>"


def drawing(width: float, height: float, parts: Sequence[str], description: str) -> Markup:
    """A whole plot. description: for people who cannot see it."""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}" class="plot"'
        f' style="min-width:{0.8 * width:g}px;max-width:{1.1 * width:g}px">{"".join(parts)}</svg>'
    )


def _at(place: float | str) -> str:
    return place if isinstance(place, str) else f"{place:.1f}"


@dataclass(frozen=True)
class Field:
    """The size of a drawing, and the rectangle in it where points lie, in pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float

    def frame(
        self, upwards: Scale, across: Mapping[float, str], names: tuple[str, str], count: int, lines: bool
    ) -> list[str]:
        """Grid, ticks as far as there is room for them, and the names of the axes.

        upwards: scale of the values
        across:  x of each tick -> its text
        names:   of the two axes
        count:   about how many ticks upwards
        lines:   whether ticks across have grid lines
        """
        parts = [line(x, self.top, x, self.bottom, "grid") for x in across] if lines else []
        for x, words in thinned({x: shortened(words, TICK) for x, words in across.items()}).items():
            parts.append(text(x, self.bottom + 18, words, "tick", "middle"))
        for tick in ticks(upwards, count):
            y = upwards(tick)
            parts.append(line(self.left, y, self.right, y, "grid"))
            parts.append(text(self.left - 8, y + 4, tick_label(tick), "tick", "end"))
        most = int((self.right - self.left) / LETTER)
        right, left = (shortened(name, most) for name in (names[0], f"upwards: {names[1]}"))
        parts.append(text(self.right, self.bottom + 38, right, "axis", "end"))
        together = width_of(right) + width_of(left) < self.right - self.left
        return [*parts, text(self.left, self.bottom + 38 if together else self.top - 4, left, "axis")]


# --- curves: a line a method, an interval a point ---

WIDE = Field(760, 380, 62, 560, 14, 334)  # names stand right of the field
LOW = Field(760, 300, 62, 560, 14, 254)


@dataclass(frozen=True)
class CurvePoint:
    """One value with its interval at a place of the axis. tip: text under the pointer."""

    x: float
    value: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class Curve:
    """Points that are joined. group: of the method, for colour and shape."""

    name: str
    group: str
    points: Sequence[CurvePoint]


def curves(
    lines: Sequence[Curve],
    places: Mapping[float, str],
    x_words: str,
    y_words: str,
    description: str,
    level: "tuple[str, Estimate] | None" = None,
    field: Field = WIDE,
    zero: bool = False,
) -> Markup:
    """Values along an axis, one line a method.

    lines:       the methods
    places:      x -> text on the axis
    level:       a name and a value that is drawn across
    field:       size
    zero:        whether the axis of values begins at zero
    description: for people who cannot see it
    """
    points = [point for one in lines for point in one.points]
    across = scale([point.x for point in points], field.left, field.right, room=0.08)
    ends = [end for point in points for end in (point.low, point.high)]
    ends += [*((level[1].low, level[1].high) if level else ()), *((0.0,) if zero else ())]
    upwards = scale(ends, field.bottom, field.top)
    axis = {across(x): words for x, words in places.items()}
    widest = max(len(one.points) for one in lines)
    parts = field.frame(upwards, axis, (x_words, y_words), 5, lines=False)
    names = [(upwards(one.points[-1].value), one.name, one.group) for one in lines]
    if level is not None:
        parts += _band(field, *(upwards(end) for end in (level[1].low, level[1].value, level[1].high)))
        names.append((upwards(level[1].value), level[0], "level"))
    apart = APART if any(point.high > point.low for point in points) else 0
    for place, one in enumerate(lines):
        shift = (place - (len(lines) - 1) / 2) * apart
        at = [(across(point.x) + shift, upwards(point.value)) for point in one.points]
        parts += [line(*start, *end, f"curve {one.group}") for start, end in pairwise(at)]
        for (x, y), point in zip(at, one.points, strict=True):
            if point.high > point.low:
                parts.append(line(x, upwards(point.low), x, upwards(point.high), f"whisker {one.group}"))
            parts.append(mark(x, y, one.group, point.tip, min(1, MARKED / widest)))
    beside, width, height = _beside(field, names)
    return drawing(width, height, [*parts, *beside], description)


def _band(field: Field, low: float, middle: float, high: float) -> list[str]:
    """A value across the field, and its interval behind it."""
    size = f'width="{field.right - field.left}" height="{low - high:.1f}"'
    band = f'<rect x="{field.left}" y="{high:.1f}" {size} class="band"/>'
    return [band, line(field.left, middle, field.right, middle, "reference")]


def _beside(field: Field, names: Sequence[tuple[float, str, str]]) -> tuple[list[str], float, float]:
    """Names of lines right of the field, apart: (y, name, group) each.

    Returns them, and the width and height that the drawing needs for them.
    """
    parts, names = [], sorted((y, shortened(name), group) for y, name, group in names)
    heights = stacked([y for y, _, _ in names], field.top, field.bottom)
    for (y, name, group), height in zip(names, heights, strict=True):
        parts.append(line(field.right + 2, y, field.right + 14, height, "leader"))
        parts.append(text(field.right + 18, height + 4, name, f"label {group}"))
    width = max(width_of(name) for _, name, _ in names) + field.right + 24
    return parts, max(field.width, width), max(field.height, heights[-1] + 10)


# --- scatter: quality against cost ---

BROAD = Field(1080, 430, 62, 1064, 14, 384)


@dataclass(frozen=True)
class Spot:
    """One method. cost: one measurement; spread: the same with its interval, if it has one."""

    title: str
    group: str
    cost: float
    spread: "Estimate | None"
    quality: "Estimate"


def scatter(found: Sequence[Spot], unit: str, quality: str, description: str) -> Markup:
    """Quality against cost, on a logarithmic scale. unit: of the cost; quality: name of the metric."""
    field, found = BROAD, sorted(found, key=lambda spot: FIRST.index(spot.group))
    across = scale([spot.cost for spot in found], field.left, field.right, log=True, room=0.12)
    ends = [end for spot in found for end in (spot.quality.low, spot.quality.high)]
    upwards = scale(ends, field.bottom, field.top)
    axis = {across(tick): tick_label(tick) for tick in ticks(across)}
    parts = field.frame(upwards, axis, (f"{unit}, cheaper to the left", quality), 6, lines=True)
    points, bars = [], []
    for spot in found:
        x, y = across(spot.cost), upwards(spot.quality.value)
        low, high = upwards(spot.quality.low), upwards(spot.quality.high)
        points.append((x, y, shortened(spot.title)))
        bars.append(Box(x - 2, high, x + 2, low))
        parts.append(line(x, low, x, high, f"whisker faint {spot.group}"))
        if spot.spread is not None and spot.spread.low > 0:
            left, right = max(field.left, across(spot.spread.low)), min(field.right, across(spot.spread.high))
            parts.append(line(left, y, right, y, f"whisker faint {spot.group}"))
    labels = place_labels(points, bars, Box(field.left + 4, field.top, field.right, field.bottom))
    far = [(x, y, label) for (x, y, _), label in zip(points, labels, strict=True) if label.far]
    parts += [line(x, y, label.x, label.y - 4, "leader") for x, y, label in far]
    places = decimals([spot.quality for spot in found])
    for (x, y, words), label, spot in zip(points, labels, found, strict=True):
        value = f"{with_interval(spot.quality, places)}, n = {spot.quality.n}"
        parts.append(mark(x, y, spot.group, f"{words}: {tick_label(round(spot.cost, 4))} {unit}, {value}"))
        parts.append(text(label.x, label.y, words, f"label {spot.group}", label.anchor))
    return drawing(field.width, field.height, parts, description)


@dataclass(frozen=True)
class ForestEntry:
    """One row of a forest plot.

    p: after Holm's correction; None if the comparison is not in the family that is corrected
    """

    title: str
    group: str
    difference: "Estimate"
    verdict: str = ""
    p: float | None = None
    strong: bool = False


def forest(entries: Sequence[ForestEntry], higher_is_better: bool) -> Table:
    """A table from best to worst; its second column is drawn, in percent of the cell's width."""
    sign = -1 if higher_is_better else 1
    rows = sorted(entries, key=lambda entry: (sign * entry.difference.value, entry.title))
    ends = [end for entry in rows for end in (entry.difference.low, entry.difference.high)]
    across = scale([0.0, *ends], 0, 100)
    at = {tick: f"{across(tick):.2f}%" for tick in ticks(across)}
    grid = "".join(line(place, "0", place, "100%", "grid" if tick else "zero") for tick, place in at.items())
    corrected = any(entry.p is not None for entry in rows)
    made = []
    for entry in rows:
        found, group = entry.difference, entry.group
        low, value, high = (f"{across(number):.2f}%" for number in (found.low, found.value, found.high))
        place = f'x="{value}" y="50%" overflow="visible"'
        shape = f'<svg {place} class="mark {group}"><g>{SHAPES[group]}</g></svg>'
        drawn = f"{grid}{line(low, '50%', high, '50%', f'whisker {group}')}{shape}"
        shown = Shown(found, signed=True, verdict=entry.verdict)
        cells: list[Cell] = [entry.title, _as_wide(ROW, drawn), shown]
        cells += [None if entry.p is None else probability(entry.p)] if corrected else []
        made.append(TableRow(cells, strong=entry.strong))
    # As many ticks as the column has room for, and on a phone.
    room, phone = (
        set(thinned({wide * across(tick) / 100: tick_label(tick) for tick in at}).values()) for wide in COLUMN
    )
    axis = "".join(
        text(place, "13", words, "tick" if words in phone else "tick roomy", "middle")
        for tick, place in at.items()
        if (words := tick_label(tick)) in room
    )
    made.append(TableRow(["", _as_wide(18, axis), None, *([None] if corrected else [])]))
    left, right = ("worse", "better") if higher_is_better else ("better", "worse")
    sides = Markup(f'<span class="sides"><span>← {left}</span><span>{right} →</span></span>')
    return Table(["method", sides, "difference", *(["p, Holm"] if corrected else [])], made, kind="forest")


def _as_wide(height: int, parts: str) -> Markup:
    return Markup(f'<svg width="100%" height="{height}" aria-hidden="true">{parts}</svg>')
