"""A score along an axis of numbers: a line a method, an interval a point."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from afa.evaluation.columns import Column
from afa.evaluation.report.content import arrow
from afa.evaluation.report.numbers import with_interval
from afa.evaluation.report.placing import names_beside
from afa.evaluation.report.studies import Point
from afa.evaluation.report.svg import Scale, drawing, line, mark, scale, text, tick_label, ticks
from afa.evaluation.statistics import Estimate

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 560, 14, 334  # of the field; names stand right of it
APART = 5.0  # pixels between lines at one place, so that their intervals can be told apart

Lines = Mapping[str, Sequence[Point]]
Level = tuple[str, Estimate] | None


def curves(lines: Lines, column: Column, axis: str, level: Level = None) -> str:
    """lines: by title. level: a name and a value to compare with, drawn across with its interval."""
    points = [point for line_points in lines.values() for point in line_points]
    across = scale([float(point.place) for point in points], LEFT, RIGHT, room=0.08)
    ends = [end for point in points for end in (point.value.low, point.value.high)]
    upwards = scale([*ends, *([level[1].low, level[1].high] if level else [])], BOTTOM, TOP)
    parts = _frame(across, upwards, column, axis, sorted({float(point.place) for point in points}))
    parts += _level(level[1], upwards) if level else []
    for place, (name, line_points) in enumerate(lines.items()):
        parts += _line(name, line_points, across, upwards, (place - (len(lines) - 1) / 2) * APART)
    parts += _names(lines, upwards, level)
    return drawing(WIDTH, HEIGHT, parts, f"{column.metric} against {axis} for {', '.join(lines)}")


def _line(name: str, points: Sequence[Point], across: Scale, upwards: Scale, shift: float) -> list[str]:
    """Points joined, each with its interval."""
    group = points[0].method.group
    at = [(across(float(point.place)) + shift, upwards(point.value.value)) for point in points]
    drawn = [line(*start, *end, f"curve {group}") for start, end in pairwise(at)]
    for (x, y), point in zip(at, points, strict=True):
        tip = f"{name}, {point.place:g}: {with_interval(point.value, 3)}, n = {point.value.n}"
        drawn += [line(x, upwards(point.value.low), x, upwards(point.value.high), f"whisker {group}"), mark(x, y, group, tip)]
    return drawn


def _level(value: Estimate, upwards: Scale) -> list[str]:
    top, bottom = upwards(value.high), upwards(value.low)
    band = f'<rect x="{LEFT}" y="{top:.1f}" width="{RIGHT - LEFT}" height="{bottom - top:.1f}" class="band"/>'
    return [band, line(LEFT, upwards(value.value), RIGHT, upwards(value.value), "reference")]


def _names(lines: Lines, upwards: Scale, level: Level) -> list[str]:
    """The names at the lines' right ends, pushed apart where they would lie on each other."""
    wanted = [(upwards(points[-1].value.value), name, points[-1].method.group) for name, points in lines.items()]
    wanted += [(upwards(level[1].value), level[0], "level")] if level else []
    return names_beside(wanted, RIGHT, TOP)


def _frame(across: Scale, upwards: Scale, column: Column, axis: str, places: Sequence[float]) -> list[str]:
    parts = [text(across(place), BOTTOM + 18, tick_label(place), "tick", "middle") for place in places]
    for tick in ticks(upwards, 5):
        parts += [
            line(LEFT, upwards(tick), RIGHT, upwards(tick), "grid"),
            text(LEFT - 8, upwards(tick) + 4, tick_label(tick), "tick", "end"),
        ]
    parts.append(text(RIGHT, BOTTOM + 38, axis, "axis", "end"))
    return [*parts, text(LEFT, BOTTOM + 38, f"upwards: {column.metric} {arrow(column)}", "axis")]
