"""Quality against cost: a point a method, its interval, its name."""

from collections.abc import Sequence
from dataclasses import dataclass

from afa.evaluation.columns import Column
from afa.evaluation.compare import Analysis
from afa.evaluation.report.content import arrow
from afa.evaluation.report.numbers import decimals, with_interval
from afa.evaluation.report.placing import Box, place_labels
from afa.evaluation.report.svg import Scale, drawing, line, mark, scale, text, tick_label, ticks
from afa.evaluation.statistics import Estimate

WIDTH, HEIGHT = 1080, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 1064, 14, 384  # of the field
FIRST = ("ours", "expert", "control", "merge", "sampling", "bound")  # whose labels are placed first


@dataclass(frozen=True)
class Spot:
    """One method. cost: with its interval, or a single measurement."""

    title: str
    group: str
    cost: float
    spread: Estimate | None
    quality: Estimate


def spots(one: Analysis, column: Column, what: str) -> list[Spot]:
    """Every row that has both. what: seconds or memory."""
    found = []
    for method in one.rows:
        seconds = one.seconds.get(method.name) if what == "seconds" else None
        memory = [run.memory_mb for run in method.runs if run.memory_mb] if what == "memory" else []
        cost = seconds.value if seconds is not None else max(memory, default=0.0)
        if cost > 0 and method.name in column.values:
            found.append(Spot(method.title, method.group, cost, seconds, column.values[method.name]))
    return sorted(found, key=lambda spot: FIRST.index(spot.group))


def scatter(found: Sequence[Spot], column: Column, unit: str) -> str:
    """Cost to the right on a logarithmic scale, quality upwards. unit: of the cost, in words."""
    across = scale([spot.cost for spot in found], LEFT, RIGHT, log=True, room=0.12)
    upwards = scale([end for spot in found for end in (spot.quality.low, spot.quality.high)], BOTTOM, TOP)
    parts = [*_frame(across, upwards, column, unit), *(_whiskers(spot, across, upwards) for spot in found)]
    points = [(across(spot.cost), upwards(spot.quality.value), spot.title) for spot in found]
    bars = [
        Box(x - 2, upwards(spot.quality.high), x + 2, upwards(spot.quality.low))
        for (x, _, _), spot in zip(points, found, strict=True)
    ]
    labels = place_labels(points, bars, Box(LEFT + 4, TOP, RIGHT, BOTTOM))
    for (x, y, _), label in zip(points, labels, strict=True):
        parts += [line(x, y, label.x, label.y - 4, "leader")] if label.far else []
    places = decimals([spot.quality for spot in found])
    for (x, y, words), label, spot in zip(points, labels, found, strict=True):
        quality = f"{with_interval(spot.quality, places)}, n = {spot.quality.n}"
        tip = f"{words}: {tick_label(round(spot.cost, 4))} {unit}, {quality}"
        parts += [mark(x, y, spot.group, tip), text(label.x, label.y, words, f"label {spot.group}", label.anchor)]
    return drawing(WIDTH, HEIGHT, parts, f"{column.metric} of {len(found)} methods against {unit}")


def _frame(across: Scale, upwards: Scale, column: Column, unit: str) -> list[str]:
    """Grid, ticks and the names of the axes."""
    parts = []
    for tick in ticks(across):
        parts += [
            line(across(tick), TOP, across(tick), BOTTOM, "grid"),
            text(across(tick), BOTTOM + 18, tick_label(tick), "tick", "middle"),
        ]
    for tick in ticks(upwards):
        parts += [
            line(LEFT, upwards(tick), RIGHT, upwards(tick), "grid"),
            text(LEFT - 8, upwards(tick) + 4, tick_label(tick), "tick", "end"),
        ]
    parts.append(text(RIGHT, BOTTOM + 38, f"{unit}, cheaper to the left", "axis", "end"))
    return [*parts, text(LEFT, BOTTOM + 38, f"upwards: {column.metric} {arrow(column)}", "axis")]


def _whiskers(spot: Spot, across: Scale, upwards: Scale) -> str:
    x, y = across(spot.cost), upwards(spot.quality.value)
    drawn = line(x, upwards(spot.quality.low), x, upwards(spot.quality.high), f"whisker faint {spot.group}")
    if spot.spread is None or spot.spread.low <= 0:
        return drawn
    return drawn + line(
        max(LEFT, across(spot.spread.low)), y, min(RIGHT, across(spot.spread.high)), y, f"whisker faint {spot.group}"
    )
