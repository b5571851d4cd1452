"""The chart of stages and steps: what every expert weighs there, and where no image uses it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.explanation.causes import Unused
from afa.pictures import INK, LINE, MARGIN, MUTED, Canvas, colour_of, fitting, heat, wrapped

PANEL_GAP, STAGE_NAMES, WIDEST = 30, 64, 1340


def chart(unused: Unused, means: NDArray[np.float32], timesteps: Sequence[float], images: int) -> Image.Image:
    """Draw a panel for each expert, with a row for each stage and a column for each pass.

    means:     (passes, K, N) mean weights over images
    timesteps: of each pass
    images:    how many there are
    """
    passes, stages, experts = means.shape
    wide = min(24, max(6, 320 // passes))
    tall = 22 if stages <= 12 else 16
    panel = (STAGE_NAMES + wide * passes + PANEL_GAP, tall * stages + 92)
    across = max(1, min(experts, (WIDEST - 2 * MARGIN) // panel[0]))
    width = max(2 * MARGIN + across * panel[0] - PANEL_GAP, 700)
    note = wrapped(_chart_note(unused, images), 13, width - 2 * MARGIN, 3)
    canvas = Canvas(width, 60 + -(-experts // across) * panel[1] + 20 * len(note) + 10)
    canvas.text(MARGIN, 18, "Mean weight by stage and step", 20)
    for expert in range(experts):
        x, y = MARGIN + expert % across * panel[0], 64 + expert // across * panel[1]
        _chart_panel(canvas, x, y, unused, means, timesteps, expert, (wide, tall))
    canvas.lines(MARGIN, canvas.image.height - 20 * len(note) - 10, note, 20, 13, MUTED)
    return canvas.image


def _chart_note(unused: Unused, images: int) -> str:
    mean = "of the one image" if images == 1 else f"over {images} images"
    return (
        f"White is a weight of 0, full colour 1: the mean {mean}. Crossed out: below {unused.threshold:g} in"
        " every image, with and without the prompt, in every blend of the expert's features there."
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
    left, top = x + STAGE_NAMES, y + 28
    canvas.block(left, y + 2, 14, 14, colour_of(expert))
    count = f" unused at {unused.counts[expert]} of {unused.total}"
    name = fitting(unused.experts[expert], 15, max(60, wide * passes - 24 - 8 * len(count)))
    canvas.text(left + 21, y, name, 15)
    canvas.text(left + wide * passes, y + 3, count.strip(), 12, MUTED, anchor="ra")
    canvas.picture(left, top, heat(means[:, :, expert].T, colour_of(expert)), wide * passes, tall * stages)
    for place, stage in enumerate(unused.stages):
        canvas.text(left - 8, top + tall * (place + 0.5), stage, 12, MUTED, anchor="rm")
    for step, place in zip(*np.nonzero(unused.cells[:, :, expert]), strict=True):
        _cross(canvas, left + wide * step, top + tall * place, wide, tall)
    ends = ((0, "la"), (passes // 2, "ma"), (passes - 1, "ra")) if passes > 2 else ((0, "la"),)
    for step, anchor in ends:
        x = left + wide * (step + {"la": 0.0, "ma": 0.5, "ra": 1.0}[anchor])
        canvas.text(
            x,
            top + tall * stages + 6,
            f"t = {timesteps[step]:.0f}" if not step else f"{timesteps[step]:.0f}",
            12,
            MUTED,
            anchor=anchor,
        )


def _cross(canvas: Canvas, x: float, y: float, wide: int, tall: int) -> None:
    """Cross out a cell, on grey, since these cells are nearly white."""
    canvas.pen.rectangle((x, y, x + wide - 1, y + tall - 1), fill=(241, 243, 244), outline=LINE)
    inset = max(2, min(wide, tall) // 4)
    middle, half = (x + wide / 2, y + tall / 2), min(wide, tall) / 2 - inset
    for sign in (1, -1):
        canvas.pen.line(
            (middle[0] - half, middle[1] - sign * half, middle[0] + half, middle[1] + sign * half), fill=INK
        )
