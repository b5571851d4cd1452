"""The pictures of one explained image: the sheet, the animated strip, the contact sheet, the words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.explanation.causes import Causes, Counterfactual
from afa.explanation.explanation import WordRow, word_remarks, word_rows
from afa.explanation.recording import FRAMES, Recording, evenly_spread
from afa.explanation.shares import FINAL, lead_at, resized, spotlight, stage_groups, weights_at
from afa.pictures import LIGHT, MARGIN, Canvas, Ground, colour_of, fitting, font, heat, name_width, wrapped

# --- the sheet: who weighs where, over the steps and by group of stages ---

CELL, CELL_GAP, BIG, NARROWEST = 104, 10, 232, 1160
STEPS = 5  # columns
# Two lines of heading, passes (None: all), stages (None: all)
Column = tuple[str, str, "Sequence[int] | None", "Sequence[str] | None"]


def sheet(recording: Recording, facts: str, ground: Ground = LIGHT) -> Image.Image:
    """Draw the sheet of one image: the image, its overlay and the mean weights; below, a row for each expert.

    facts:  a line under the prompt
    ground: what it is drawn on
    """
    sections = [
        ("over the steps, all stages together", over_steps(recording)),
        ("by part of the network, all steps together", by_group(recording)),
    ]
    label = name_width(recording.experts, 130, 230)
    wide = [
        max(len(part) * (CELL + CELL_GAP) - CELL_GAP, round(font(15).getlength(title)))
        for title, part in sections
    ]
    width = max(NARROWEST, 4 * MARGIN + label + sum(wide))
    high = round(CELL * recording.image.shape[0] / recording.image.shape[1])
    top = _sheet_top(recording, facts, width, ground)
    canvas = Canvas(width, top.image.height + 92 + len(recording.experts) * (high + 30) + MARGIN, ground)
    canvas.image.paste(top.image, (0, 0))
    x = MARGIN + label
    for (title, part), own in zip(sections, wide, strict=True):
        canvas.text(x, top.image.height + 8, title, 15)
        canvas.rule(x, top.image.height + 31, own)
        for place, column in enumerate(part):
            _sheet_column(
                canvas, x + place * (CELL + CELL_GAP), top.image.height + 40, column, recording, high
            )
        x += own + 2 * MARGIN
    _sheet_labels(canvas, top.image.height + 92, recording, high, label)
    return canvas.image


def over_steps(recording: Recording) -> list[Column]:
    """Return a column for each of some passes, from noise to image."""
    return [
        (f"step {index + 1}", f"t = {recording.timesteps[index]:.0f}", [index], None)
        for index in evenly_spread(len(recording.timesteps), STEPS)
    ]


def by_group(recording: Recording) -> list[Column]:
    """Return a column for each group of stages, in the order in which they run."""
    return [(name, _members(name, own), None, own) for name, own in stage_groups(recording.stages).items()]


def _members(name: str, stages: Sequence[str]) -> str:
    if name == FINAL:
        return stages[0]
    return "1 stage" if len(stages) == 1 else f"{len(stages)} stages"


def _sheet_column(
    canvas: Canvas, x: float, y: float, column: Column, recording: Recording, high: int
) -> None:
    first, second, passes, stages = column
    canvas.text(x + CELL / 2, y, fitting(first, 14, CELL), 14, anchor="ma")
    canvas.text(x + CELL / 2, y + 19, second, 12, muted=True, anchor="ma")
    weights = weights_at(recording, passes, stages)
    for expert, own in enumerate(weights):
        at = y + 52 + expert * (high + 30)
        canvas.picture(x, at, heat(own, colour_of(expert), canvas.ground), CELL, high)
        canvas.text(x + CELL / 2, at + high + 5, _share(float(own.mean())), 12, muted=True, anchor="ma")


def _sheet_labels(canvas: Canvas, y: float, recording: Recording, high: int, label: int) -> None:
    for expert, name in enumerate(recording.experts):
        at = y + expert * (high + 30) + high / 2
        canvas.block(MARGIN, at - 8, 16, 16, colour_of(expert))
        canvas.text(MARGIN + 24, at, fitting(name, 15, label - 34), 15, anchor="lm")


def _sheet_top(recording: Recording, facts: str, width: float, ground: Ground) -> Canvas:
    """Draw the top of the sheet: prompt, image, overlay, legend."""
    lines = wrapped(recording.prompt, 21, width - 2 * MARGIN, 2)
    high = round(BIG * recording.image.shape[0] / recording.image.shape[1])
    head = MARGIN + 28 * len(lines) + 30
    rows = len(recording.experts) * 34 + 76
    canvas = Canvas(width, head + max(high + 24, rows) + 20, ground)
    canvas.lines(MARGIN, MARGIN - 6, lines, 28, 21)
    canvas.text(MARGIN, MARGIN + 28 * len(lines) - 2, facts, 13, muted=True)
    for place, (pixels, caption) in enumerate(
        ((recording.image, "the image"), (lead_at(recording), "who weighs more here than elsewhere"))
    ):
        x = MARGIN + place * (BIG + 16)
        canvas.picture(x, head, pixels, BIG, high)
        canvas.text(x, head + high + 6, caption, 13, muted=True)
    _sheet_legend(canvas, MARGIN + 2 * (BIG + 16) + 24, head, recording, width)
    return canvas


def _sheet_legend(canvas: Canvas, x: float, y: float, recording: Recording, width: float) -> None:
    """Draw the legend: names, colours, and the mean weights as bars."""
    canvas.text(x, y, "mean weight, all steps, stages and places", 15)
    names = name_width(recording.experts, 130, 340)
    full = width - x - MARGIN - names - 50
    for expert, (name, share) in enumerate(
        zip(recording.experts, weights_at(recording).mean((1, 2)), strict=True)
    ):
        at = y + 34 + expert * 34
        canvas.block(x, at, 16, 16, colour_of(expert))
        canvas.text(x + 24, at + 8, fitting(name, 15, names - 34), 15, anchor="lm")
        canvas.block(x + names, at - 2, full * float(share), 20, colour_of(expert))
        canvas.text(
            x + names + full * float(share) + 8, at + 8, f"{float(share):.0%}", 14, muted=True, anchor="lm"
        )
    at = y + 34 + len(recording.experts) * 34 + 8
    canvas.text(
        x, at, f"Below: {canvas.ground.name} is a weight of 0, full colour a weight of 1;", 13, muted=True
    )
    canvas.text(x, at + 18, "the number is the mean over the map.", 13, muted=True)


def _share(value: float) -> str:
    """Format a share: 0.333 as .33."""
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"


# --- the animated strip: at every step, the predicted image and the weights ---

FRAME, FRAME_GAP = 160, 10
MILLISECONDS, REST = 250, 1500  # a frame; the last one stays longer


def frames(recording: Recording, ground: Ground = LIGHT) -> list[Image.Image]:
    """Draw one frame for each predicted image, at most FRAMES.

    If no predicted image was finite, the frames show the final image.
    """
    passes = sorted(recording.drawn) or evenly_spread(len(recording.timesteps), FRAMES)
    return [frame(recording, index, ground) for index in passes]


def frame(recording: Recording, index: int, ground: Ground = LIGHT) -> Image.Image:
    """Draw the frame of one pass: the step, the predicted image, its overlay, each expert's weights."""
    tile = FRAME if len(recording.experts) <= 4 else 120
    image = recording.drawn.get(index, recording.image)
    high = round(tile * image.shape[0] / image.shape[1])
    tiles = [
        (image, "the image so far" if recording.drawn else "the final image"),
        (lead_at(recording, index), "who weighs more"),
    ]
    weights = weights_at(recording, index)
    canvas = Canvas(
        2 * MARGIN + (len(tiles) + len(weights)) * (tile + FRAME_GAP) - FRAME_GAP + FRAME_GAP,
        64 + high + 52,
        ground,
    )
    _progress(canvas, recording, index)
    for place, (pixels, caption) in enumerate(tiles):
        x = MARGIN + place * (tile + FRAME_GAP)
        canvas.picture(x, 64, pixels, tile, high)
        canvas.text(x, 64 + high + 8, fitting(caption, 14, tile), 14)
    for expert, own in enumerate(weights):
        x = MARGIN + (len(tiles) + expert) * (tile + FRAME_GAP) + FRAME_GAP
        canvas.picture(x, 64, heat(own, colour_of(expert), canvas.ground), tile, high)
        canvas.block(x, 64 + high + 9, 14, 14, colour_of(expert))
        canvas.text(x + 20, 64 + high + 8, fitting(recording.experts[expert], 14, tile - 56), 14)
        canvas.text(x + tile, 64 + high + 8, f"{float(own.mean()):.0%}", 14, muted=True, anchor="ra")
    return canvas.image


def _progress(canvas: Canvas, recording: Recording, index: int) -> None:
    count, width = len(recording.timesteps), canvas.image.width - 2 * MARGIN
    canvas.text(MARGIN, 12, f"step {index + 1} of {count}", 16)
    canvas.text(MARGIN + width, 14, f"t = {recording.timesteps[index]:.0f}", 14, muted=True, anchor="ra")
    canvas.block(MARGIN, 42, width, 5, canvas.ground.line)
    canvas.block(MARGIN, 42, width * (index + 1) / count, 5, canvas.ground.ink)


def save_strip(recording: Recording, path: Path, ground: Ground = LIGHT) -> None:
    """Save the frames as a looping animated WebP."""
    pictures = frames(recording, ground)
    durations = [*[MILLISECONDS] * (len(pictures) - 1), REST]
    pictures[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
        quality=82,
        method=4,
    )


# --- the contact sheet: the image and its counterfactuals ---

TILE, TILE_GAP, TILES = 168, 20, 5


def contact(
    prompt: str, image: NDArray[np.uint8], others: Sequence[Counterfactual], ground: Ground = LIGHT
) -> Image.Image:
    """Draw an image and its counterfactuals, all from the same noise, with what was changed and the RMSE."""
    high = round(TILE * image.shape[0] / image.shape[1])
    columns = min(TILES, len(others) + 1)
    lines = -(-(len(others) + 1) // columns)
    width = max(2 * MARGIN + columns * (TILE + TILE_GAP) - TILE_GAP, 560)
    canvas = Canvas(width, 66 + lines * (high + 74) + 10, ground)
    canvas.text(MARGIN, 20, fitting(prompt, 20, width - 2 * MARGIN), 20)
    tiles = [
        (image, "as it is", ""),
        *((other.image, other.title, f"{other.rmse:.1f} of 255 away (RMSE)") for other in others),
    ]
    for place, (pixels, title, distance) in enumerate(tiles):
        x, y = MARGIN + place % columns * (TILE + TILE_GAP), 66 + place // columns * (high + 74)
        canvas.picture(x, y, pixels, TILE, high)
        found = wrapped(title, 14, TILE, 2)
        canvas.lines(x, y + high + 7, found, 18, 14)
        canvas.text(x, y + high + 8 + 18 * len(found), distance, 12, muted=True)
    return canvas.image


# --- words: where aggregators look, where weights change without the word, which expert it calls for ---

SPOT, LABEL, SPOT_GAP = 92, 130, 18
BARS = 250  # width of the diverging bars
MOST_WORDS = 12  # words
WORD_HEADS = (
    "where aggregators look",
    "where weights change",
    "weight that changes hands without it",
    "each expert's weight with the word minus without, in percentage points",
)


def words(recording: Recording, causes: Causes | None, ground: Ground = LIGHT) -> Image.Image | None:
    """Draw a row for each word, the word with the largest effect first; None if there is no word."""
    rows = word_rows(recording, causes)[:MOST_WORDS]
    if not rows:
        return None
    high = max(
        round(SPOT * recording.image.shape[0] / recording.image.shape[1]), 22 * len(recording.experts) + 6
    )
    canvas = Canvas(
        2 * MARGIN + LABEL + 2 * (SPOT + SPOT_GAP) + 2 * (BARS + SPOT_GAP) + SPOT_GAP,
        128 + len(rows) * (high + SPOT_GAP) + 104,
        ground,
    )
    canvas.text(MARGIN, 18, fitting(recording.prompt, 20, canvas.image.width - 2 * MARGIN), 20)
    xs = [MARGIN + LABEL, MARGIN + LABEL + SPOT + SPOT_GAP, MARGIN + LABEL + 2 * (SPOT + SPOT_GAP) + SPOT_GAP]
    for x, head, room in zip(
        [*xs, xs[2] + BARS + SPOT_GAP], WORD_HEADS, (SPOT, SPOT, BARS - 20, BARS), strict=True
    ):
        canvas.lines(x, 60, wrapped(head, 13, room), 17, 13, muted=True)
    for place, row in enumerate(rows):
        _word_row(canvas, recording, causes, row, xs, 124 + place * (high + SPOT_GAP), rows)
    left = len(recording.words) - len(rows)
    remarks = word_remarks(recording) + (
        [f"Shown are the {MOST_WORDS} that move most of {left + MOST_WORDS}."] if left else []
    )
    note = wrapped(" ".join(remarks), 13, canvas.image.width - 2 * MARGIN, 3)
    canvas.lines(MARGIN, canvas.image.height - 66, note, 18, 13, muted=True)
    _words_legend(canvas, recording, canvas.image.height - 100)
    return canvas.image


def _words_legend(canvas: Canvas, recording: Recording, y: float) -> None:
    """Draw the names and colours of the experts along the whole width."""
    room = (canvas.image.width - 2 * MARGIN) / len(recording.experts)
    width = min(room, name_width(recording.experts, 90, 400))
    for expert, name in enumerate(recording.experts):
        canvas.block(MARGIN + expert * width, y, 14, 14, colour_of(expert))
        canvas.text(MARGIN + expert * width + 21, y + 7, fitting(name, 14, width - 32), 14, anchor="lm")


def _word_row(
    canvas: Canvas,
    recording: Recording,
    causes: Causes | None,
    row: WordRow,
    xs: list[int],
    y: float,
    rows: list[WordRow],
) -> None:
    index = next(place for place, word in enumerate(recording.words) if word.text == row.word)
    canvas.text(MARGIN, y + SPOT / 2 - 10, fitting(row.word, 17, LABEL - 10), 17, anchor="lm")
    if row.looked is not None and recording.attention is not None:
        canvas.text(MARGIN, y + SPOT / 2 + 10, f"{row.looked:.1%} of looking", 12, muted=True, anchor="lm")
        largest = max(recording.attention.maps.values(), key=lambda maps: maps[0].size).shape[1:]
        looked = sum(resized(maps[index], largest) for maps in recording.attention.maps.values())
        canvas.picture(xs[0], y, spotlight(recording.image, looked, canvas.ground), SPOT)
    if causes is not None:
        canvas.picture(
            xs[1], y, spotlight(recording.image, causes.omitted.places[index], canvas.ground), SPOT
        )
        _amounts(canvas, row, xs[2], y, max(other.omitted or 0 for other in rows))
        _pulls(
            canvas,
            recording,
            row,
            xs[2] + BARS + SPOT_GAP,
            y,
            max(abs(other.omitted_pull).max() for other in rows if other.omitted_pull is not None),
        )


def _amounts(canvas: Canvas, row: WordRow, x: float, y: float, most: float) -> None:
    """Draw how much weight moves without a word: left out of the prompt, and hidden from aggregators."""
    for place, (amount, what) in enumerate(
        ((row.omitted, "left out of the prompt"), (row.hidden, "hidden from the aggregators only"))
    ):
        at = y + 4 + place * 44
        if amount is None:
            continue
        canvas.block(x, at, (BARS - 90) * amount / (most or 1), 16, canvas.ground.muted)
        canvas.text(x + (BARS - 90) * amount / (most or 1) + 6, at + 8, f"{amount:.2%}", 13, anchor="lm")
        canvas.text(x, at + 18, what, 12, muted=True)


def _pulls(canvas: Canvas, recording: Recording, row: WordRow, x: float, y: float, most: float) -> None:
    """Draw each expert's pull: to the right if the word raises its weight, to the left if it lowers it."""
    middle, room = x + BARS / 2, BARS / 2 - 44
    canvas.pen.line((middle, y, middle, y + 22 * len(recording.experts)), fill=tuple(canvas.ground.line))
    assert row.omitted_pull is not None
    for expert, pull in enumerate(row.omitted_pull):
        at, long = y + 3 + expert * 22, room * abs(float(pull)) / (float(most) or 1)
        canvas.block(middle if pull > 0 else middle - long, at, long, 16, colour_of(expert))
        side = "lm" if pull > 0 else "rm"
        canvas.text(
            middle + (long + 5) * (1 if pull > 0 else -1),
            at + 8,
            _points(100 * float(pull)),
            12,
            muted=True,
            anchor=side,
        )


def _points(value: float) -> str:
    """Format percentage points: +0.8, -0.4, and 0.0 without a sign."""
    found = f"{value:+.1f}"
    return found if found.strip("+-0.") else "0.0"
