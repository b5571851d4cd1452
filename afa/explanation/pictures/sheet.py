"""The sheet: who weighs where, over the steps and by group of stages."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from afa.explanation.pictures.canvas import (
    MARGIN,
    MUTED,
    Canvas,
    colour_of,
    decimals,
    fitting,
    font,
    name_width,
    wrapped,
)
from afa.explanation.recording import Recording
from afa.explanation.shares import FINAL, lead_at, stage_groups, weights_at
from afa.visualise.weights import heat

CELL, GAP, BIG, NARROWEST = 104, 10, 232, 1160
STEPS = 5  # columns
Column = tuple[str, str, "Sequence[int] | None", "Sequence[str] | None"]  # two lines of heading, passes, stages


def sheet(recording: Recording, facts: str) -> Image.Image:
    """One image: it, its overlay and what every expert weighs; below, a row an expert. facts: said under the prompt."""
    sections = [("over the steps, all stages together", over_steps(recording)), ("by part of the network, all steps together", by_group(recording))]
    label = name_width(recording.experts, 130, 230)
    wide = [max(len(part) * (CELL + GAP) - GAP, round(font(15).getlength(title))) for title, part in sections]
    width = max(NARROWEST, 4 * MARGIN + label + sum(wide))
    high = round(CELL * recording.image.shape[0] / recording.image.shape[1])
    top = _top(recording, facts, width)
    canvas = Canvas(width, top.image.height + 92 + len(recording.experts) * (high + 30) + MARGIN)
    canvas.image.paste(top.image, (0, 0))
    x = MARGIN + label
    for (title, part), own in zip(sections, wide, strict=True):
        canvas.text(x, top.image.height + 8, title, 15)
        canvas.rule(x, top.image.height + 31, own)
        for place, column in enumerate(part):
            _column(canvas, x + place * (CELL + GAP), top.image.height + 40, column, recording, high)
        x += own + 2 * MARGIN
    _labels(canvas, top.image.height + 92, recording, high, label)
    return canvas.image


def over_steps(recording: Recording) -> list[Column]:
    """Some passes, from noise to image."""
    count = len(recording.timesteps)
    chosen = np.unique(np.linspace(0, count - 1, min(STEPS, count)).round().astype(int))
    return [(f"step {index + 1}", f"t = {recording.timesteps[index]:.0f}", [int(index)], None) for index in chosen]


def by_group(recording: Recording) -> list[Column]:
    """Groups of stages, in the order in which the image passes them."""
    return [(name, _members(name, own), None, own) for name, own in stage_groups(recording.stages).items()]


def _members(name: str, stages: Sequence[str]) -> str:
    if name == FINAL:
        return stages[0]
    return "1 stage" if len(stages) == 1 else f"{len(stages)} stages"


def _column(canvas: Canvas, x: float, y: float, column: Column, recording: Recording, high: int) -> None:
    first, second, passes, stages = column
    canvas.text(x + CELL / 2, y, fitting(first, 14, CELL), 14, anchor="ma")
    canvas.text(x + CELL / 2, y + 19, second, 12, MUTED, anchor="ma")
    weights = weights_at(recording, passes, stages)
    for expert, own in enumerate(weights):
        at = y + 52 + expert * (high + 30)
        canvas.picture(x, at, heat(own, colour_of(expert)), CELL, high)
        canvas.text(x + CELL / 2, at + high + 5, decimals(float(own.mean())), 12, MUTED, anchor="ma")


def _labels(canvas: Canvas, y: float, recording: Recording, high: int, label: int) -> None:
    for expert, name in enumerate(recording.experts):
        at = y + expert * (high + 30) + high / 2
        canvas.block(MARGIN, at - 8, 16, 16, colour_of(expert))
        canvas.text(MARGIN + 24, at, fitting(name, 15, label - 34), 15, anchor="lm")


def _top(recording: Recording, facts: str, width: float) -> Canvas:
    """The prompt, the image, the overlay, the legend."""
    lines = wrapped(recording.prompt, 21, width - 2 * MARGIN, 2)
    high = round(BIG * recording.image.shape[0] / recording.image.shape[1])
    head = MARGIN + 28 * len(lines) + 30
    rows = len(recording.experts) * 34 + 76
    canvas = Canvas(width, head + max(high + 24, rows) + 20)
    for index, line in enumerate(lines):
        canvas.text(MARGIN, MARGIN - 6 + 28 * index, line, 21)
    canvas.text(MARGIN, MARGIN + 28 * len(lines) - 2, facts, 13, MUTED)
    for place, (pixels, caption) in enumerate(((recording.image, "the image"), (lead_at(recording), "who weighs more here than elsewhere"))):
        x = MARGIN + place * (BIG + 16)
        canvas.picture(x, head, pixels, BIG, high)
        canvas.text(x, head + high + 6, caption, 13, MUTED)
    _legend(canvas, MARGIN + 2 * (BIG + 16) + 24, head, recording, width)
    return canvas


def _legend(canvas: Canvas, x: float, y: float, recording: Recording, width: float) -> None:
    """Names, colours, and the mean weight as a bar."""
    canvas.text(x, y, "mean weight, all steps, stages and places", 15)
    names = name_width(recording.experts, 130, 340)
    full = width - x - MARGIN - names - 50
    for expert, (name, share) in enumerate(zip(recording.experts, weights_at(recording).mean((1, 2)), strict=True)):
        at = y + 34 + expert * 34
        canvas.block(x, at, 16, 16, colour_of(expert))
        canvas.text(x + 24, at + 8, fitting(name, 15, names - 34), 15, anchor="lm")
        canvas.block(x + names, at - 2, full * float(share), 20, colour_of(expert))
        canvas.text(x + names + full * float(share) + 8, at + 8, f"{float(share):.0%}", 14, MUTED, anchor="lm")
    at = y + 34 + len(recording.experts) * 34 + 8
    canvas.text(x, at, "Below: white is a weight of 0, full colour a weight of 1;", 13, MUTED)
    canvas.text(x, at + 18, "the number is the mean over the map.", 13, MUTED)
