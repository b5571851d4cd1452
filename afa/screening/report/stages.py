"""A value at every stage: a line for each pair of experts."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from afa.evaluation.report.placing import names_beside
from afa.evaluation.report.svg import drawing, line, mark, scale, text, tick_label, ticks

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 560, 14, 236
GROUPS = ("expert", "merge", "sampling", "control", "ours", "bound")  # a colour and a shape each
CROWDED = 14  # stages, above which not every name is written


def stage_chart(lines: Sequence[tuple[str, Mapping[str, float]]], what: str) -> str:
    """lines: a name and its values by stage, all of the same stages. Nothing for more lines than can be told apart, or a single stage."""
    if not lines or len(lines) > len(GROUPS) or len(lines[0][1]) < 2:
        return ""
    stages = list(lines[0][1])
    step = (RIGHT - LEFT) / len(stages)
    upwards = scale([0.0, *(value for _, values in lines for value in values.values())], BOTTOM, TOP)
    places = [LEFT + step * (index + 0.5) for index in range(len(stages))]
    parts = []
    for tick in (tick for tick in ticks(upwards, 5) if tick >= 0):
        parts += [line(LEFT, upwards(tick), RIGHT, upwards(tick), "grid"), text(LEFT - 8, upwards(tick) + 4, tick_label(tick), "tick", "end")]
    every = -(-len(stages) // CROWDED)
    parts += [text(x, BOTTOM + 18, stage, "tick", "middle") for index, (x, stage) in enumerate(zip(places, stages, strict=True)) if index % every == 0]
    parts.append(text(RIGHT, BOTTOM + 40, f"stage; upwards: {what}", "axis", "end"))
    for group, (name, values) in zip(GROUPS, lines, strict=False):
        points = [(x, upwards(values[stage])) for x, stage in zip(places, stages, strict=True)]
        parts += [line(*start, *end, f"curve {group}") for start, end in pairwise(points)]
        parts += [mark(x, y, group, f"{name}, {stage}: {values[stage]:.3g}") for (x, y), stage in zip(points, stages, strict=True)]
    ends = [(upwards(values[stages[-1]]), name, group) for group, (name, values) in zip(GROUPS, lines, strict=False)]
    return drawing(WIDTH, HEIGHT, [*parts, *names_beside(ends, RIGHT, TOP)], f"{what} by stage for {', '.join(name for name, _ in lines)}")
