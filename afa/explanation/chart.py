"""The chart of stages and steps: what every expert weighs there, and where no image uses it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.explanation.causes import Unused
from afa.pictures import LIGHT, MARGIN, Canvas, Ground, colour_of, fitting, font, heat, wrapped

PANEL_GAP, STAGE_NAMES, WIDEST, LEAST = 30, 64, 1340, 230  # LEAST: room for a panel's heading


def chart(
    unused: Unused,
    means: NDArray[np.float32],
    timesteps: Sequence[float],
    images: int,
    ground: Ground = LIGHT,
) -> Image.Image:
    """Draw a panel for each expert, with a row for each stage and a column for each pass.

    means:     (passes, K, N) mean weights over images
    timesteps: of each pass
    images:    how many there are
    ground:    what it is drawn on
    """
    passes, stages, experts = means.shape
    wide = min(24, max(6, 320 // passes))
    tall = 22 if stages <= 12 else 16
    panel = (STAGE_NAMES + max(LEAST, wide * passes) + PANEL_GAP, tall * stages + 92)
    across = max(1, min(experts, (WIDEST - 2 * MARGIN) // panel[0]))
    width = max(2 * MARGIN + across * panel[0] - PANEL_GAP, 700)
    note = wrapped(_chart_note(unused, images, ground), 13, width - 2 * MARGIN, 3)
    canvas = Canvas(width, 60 + -(-experts // across) * panel[1] + 20 * len(note) + 10, ground)
    canvas.text(MARGIN, 18, "Mean weight by stage and step", 20)
    for expert in range(experts):
        x, y = MARGIN + expert % across * panel[0], 64 + expert // across * panel[1]
        _chart_panel(canvas, x, y, unused, means, timesteps, expert, (wide, tall))
    canvas.lines(MARGIN, canvas.image.height - 20 * len(note) - 10, note, 20, 13, muted=True)
    return canvas.image


def _chart_note(unused: Unused, images: int, ground: Ground) -> str:
    mean = "of the one image" if images == 1 else f"over {images} images"
    return (
        f"{ground.name.capitalize()} is a weight of 0, full colour 1: the mean {mean}."
        f" Crossed out: below {unused.threshold:g} in every image, with and without the prompt, in every"
        " blend of the expert's features there."
        " Noise is on the left, the image on the right."
    )


def _chart_panel(
    canvas: Canvas,
    x: float,
    y: float,
    unused: Unused,
    means: NDArray[np.float32],
    timesteps: Sequence[float],
    expert: int,
    cell: tuple[int, int],
) -> None:
    (wide, tall), (passes, stages, _) = cell, means.shape
    left, top, room = x + STAGE_NAMES, y + 28, max(LEAST, wide * passes)
    canvas.block(left, y + 2, 14, 14, colour_of(expert))
    count = f" unused at {unused.counts[expert]} of {unused.total}"
    name = fitting(unused.experts[expert], 15, room - 30 - font(12).getlength(count))
    canvas.text(left + 21, y, name, 15)
    canvas.text(left + room, y + 3, count.strip(), 12, muted=True, anchor="ra")
    canvas.picture(
        left, top, heat(means[:, :, expert].T, colour_of(expert), canvas.ground), wide * passes, tall * stages
    )
    for place, stage in enumerate(unused.stages):
        canvas.text(
            left - 8,
            top + tall * (place + 0.5),
            fitting(stage, 12, STAGE_NAMES - 10),
            12,
            muted=True,
            anchor="rm",
        )
    for step, place in zip(*np.nonzero(unused.cells[:, :, expert]), strict=True):
        _cross(canvas, left + wide * step, top + tall * place, wide, tall)
    _steps(canvas, left, top + tall * stages + 6, wide, timesteps)


def _steps(canvas: Canvas, left: float, y: float, wide: int, timesteps: Sequence[float]) -> None:
    """Write the timestep of the first pass, the last and the middle one, as far as there is room."""
    taken: list[tuple[float, float]] = []
    last = len(timesteps) - 1
    for step, anchor, share in ((0, "la", 0.0), (last, "ra", 1.0), (last // 2, "ma", 0.5)):
        words = f"{'' if step else 't = '}{timesteps[step]:.0f}"
        x, long = left + wide * (step + share), font(12).getlength(words)
        start = x - share * long
        if all(start > end + 8 or start + long < begin - 8 for begin, end in taken):
            canvas.text(x, y, words, 12, muted=True, anchor=anchor)
            taken.append((start, start + long))


def _cross(canvas: Canvas, x: float, y: float, wide: int, tall: int) -> None:
    """Cross out a cell, on grey, since these cells are nearly as the ground."""
    ground = canvas.ground
    canvas.pen.rectangle(
        (x, y, x + wide - 1, y + tall - 1), fill=tuple(ground.quiet), outline=tuple(ground.line)
    )
    inset = max(2, min(wide, tall) // 4)
    middle, half = (x + wide / 2, y + tall / 2), min(wide, tall) / 2 - inset
    for sign in (1, -1):
        canvas.pen.line(
            (middle[0] - half, middle[1] - sign * half, middle[0] + half, middle[1] + sign * half),
            fill=tuple(ground.ink),
        )
