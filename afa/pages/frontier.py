"""A plot of quality against distance: a line a method, a labelled point a value of guidance or steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from markupsafe import Markup

from afa.pages.charts import (
    FIRST,
    Field,
    drawing,
    line,
    mark,
    scale,
    text,
    tick_label,
    ticks,
)
from afa.pages.labels import Box, place_labels, shortened

if TYPE_CHECKING:
    from afa.stats import Estimate

PLOT = Field(900, 470, 62, 884, 14, 424)
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # of the first line of a group, of the second …
EVERY = 24.0  # pixels of a line between places that labels avoid


@dataclass(frozen=True)
class FrontierSpot:
    """One value of a line.

    label: the value, in words
    tip:   text under the pointer
    own:   whether claims are made here; the line's name and the interval of its quality are shown here
    """

    label: str
    quality: "Estimate"
    distance: float
    tip: str
    own: bool


@dataclass(frozen=True)
class FrontierLine:
    """The points of one method, joined in their order. group: of the method, for colour and shape."""

    title: str
    group: str
    spots: Sequence[FrontierSpot]


def frontier_plot(lines: Sequence[FrontierLine], names: tuple[str, str], description: str) -> Markup:
    """Draw all lines.

    names:       of the axes, across and upwards
    description: for people who cannot see it
    """
    lines = sorted(lines, key=lambda one: FIRST.index(one.group))
    spots = [spot for one in lines for spot in one.spots]
    across = scale([spot.distance for spot in spots], PLOT.left, PLOT.right, room=0.1)
    ends = [end for spot in spots if spot.own for end in (spot.quality.low, spot.quality.high)]
    upwards = scale([*ends, *(spot.quality.value for spot in spots)], PLOT.bottom, PLOT.top)
    axis = {across(tick): tick_label(tick) for tick in ticks(across)}
    parts, groups = PLOT.frame(upwards, axis, names, 6, lines=True), [one.group for one in lines]
    marks: list[str] = []
    points: list[tuple[bool, float, float, str, str]] = []
    obstacles: list[Box] = []
    for place, one in enumerate(lines):
        at = [(across(spot.distance), upwards(spot.quality.value)) for spot in one.spots]
        parts.append(_path(at, one.group, DASHES[groups[:place].count(one.group) % len(DASHES)]))
        obstacles += [box for start, end in pairwise(at) for box in _along(start, end)]
        for (x, y), spot in zip(at, one.spots, strict=True):
            marks.append(mark(x, y, one.group, spot.tip))
            if spot.own:
                low, high = upwards(spot.quality.low), upwards(spot.quality.high)
                parts.append(line(x, low, x, high, f"whisker faint {one.group}"))
            words = f"{one.title}, {spot.label}" if spot.own else spot.label
            points.append((not spot.own, x, y, shortened(words), one.group))
    points.sort(key=lambda point: point[0])  # the names of lines get the best places
    return drawing(PLOT.width, PLOT.height, [*parts, *marks, *_labels(points, obstacles)], description)


def _labels(points: Sequence[tuple[bool, float, float, str, str]], obstacles: Sequence[Box]) -> list[str]:
    """Return the labels of points: (whether it is only a value, x, y, words, group) each."""
    field = Box(PLOT.left + 4, PLOT.top, PLOT.right, PLOT.bottom)
    placed = place_labels([(x, y, words) for _, x, y, words, _ in points], obstacles, field)
    parts = []
    for (only, x, y, words, group), label in zip(points, placed, strict=True):
        parts += [line(x, y, label.x, label.y - 4, "leader")] if label.far else []
        parts.append(text(label.x, label.y, words, "tick" if only else f"label {group}", label.anchor))
    return parts


def _path(at: Sequence[tuple[float, float]], group: str, dashes: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{places}" class="curve {group}" fill="none"{dashed}/>'


def _along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Return small boxes along a segment."""
    (x1, y1), (x2, y2) = start, end
    count = max(1, round(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5 / EVERY))
    middles = [((x1 + (x2 - x1) * part / count), (y1 + (y2 - y1) * part / count)) for part in range(1, count)]
    return [Box(x - 4, y - 4, x + 4, y + 4) for x, y in middles]
