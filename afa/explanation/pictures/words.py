"""The words: where aggregators look, where weights change without the word, and which expert it calls for."""

from PIL import Image

from afa.explanation.causes import Causes
from afa.explanation.explanation import WordRow, word_remarks, word_rows
from afa.explanation.pictures.canvas import (
    LINE,
    MARGIN,
    MUTED,
    Canvas,
    colour_of,
    fitting,
    name_width,
    signed,
    wrapped,
)
from afa.explanation.recording import Recording
from afa.explanation.shares import resized, spotlight

TILE, LABEL, GAP = 92, 130, 18
BARS = 250  # width of the diverging bars
MOST = 12  # words
HEADS = (
    "where aggregators look",
    "where weights change",
    "weight that changes hands without it",
    "each expert's weight with the word minus without, in percentage points",
)


def words(recording: Recording, causes: Causes | None) -> Image.Image | None:
    """A row a word, what moves most first; None without words."""
    rows = word_rows(recording, causes)[:MOST]
    if not rows:
        return None
    high = max(round(TILE * recording.image.shape[0] / recording.image.shape[1]), 22 * len(recording.experts) + 6)
    canvas = Canvas(2 * MARGIN + LABEL + 2 * (TILE + GAP) + 2 * (BARS + GAP) + GAP, 128 + len(rows) * (high + GAP) + 104)
    canvas.text(MARGIN, 18, fitting(recording.prompt, 20, canvas.image.width - 2 * MARGIN), 20)
    xs = [MARGIN + LABEL, MARGIN + LABEL + TILE + GAP, MARGIN + LABEL + 2 * (TILE + GAP) + GAP]
    for x, head, room in zip([*xs, xs[2] + BARS + GAP], HEADS, (TILE, TILE, BARS - 20, BARS), strict=True):
        for place, line in enumerate(wrapped(head, 13, room)):
            canvas.text(x, 60 + 17 * place, line, 13, MUTED)
    for place, row in enumerate(rows):
        _row(canvas, recording, causes, row, xs, 124 + place * (high + GAP), rows)
    left = len(recording.words) - len(rows)
    remarks = word_remarks(recording) + ([f"Shown are the {MOST} that move most of {left + MOST}."] if left else [])
    for place, line in enumerate(wrapped(" ".join(remarks), 13, canvas.image.width - 2 * MARGIN, 3)):
        canvas.text(MARGIN, canvas.image.height - 66 + 18 * place, line, 13, MUTED)
    _legend(canvas, recording, canvas.image.height - 100)
    return canvas.image


def _legend(canvas: Canvas, recording: Recording, y: float) -> None:
    """Whose bars they are, along the whole width."""
    room = (canvas.image.width - 2 * MARGIN) / len(recording.experts)
    width = min(room, name_width(recording.experts, 90, 400))
    for expert, name in enumerate(recording.experts):
        canvas.block(MARGIN + expert * width, y, 14, 14, colour_of(expert))
        canvas.text(MARGIN + expert * width + 21, y + 7, fitting(name, 14, width - 32), 14, anchor="lm")


def _row(canvas: Canvas, recording: Recording, causes: Causes | None, row: WordRow, xs: list[int], y: float, rows: list[WordRow]) -> None:
    index = next(place for place, word in enumerate(recording.words) if word.text == row.word)
    canvas.text(MARGIN, y + TILE / 2 - 10, fitting(row.word, 17, LABEL - 10), 17, anchor="lm")
    if row.looked is not None and recording.attention is not None:
        canvas.text(MARGIN, y + TILE / 2 + 10, f"{row.looked:.1%} of looking", 12, MUTED, anchor="lm")
        largest = max(recording.attention.maps.values(), key=lambda maps: maps[0].size).shape[1:]
        looked = sum(resized(maps[index], largest) for maps in recording.attention.maps.values())
        canvas.picture(xs[0], y, spotlight(recording.image, looked), TILE)
    if causes is not None:
        canvas.picture(xs[1], y, spotlight(recording.image, causes.omitted.places[index]), TILE)
        _amounts(canvas, row, xs[2], y, max(other.omitted or 0 for other in rows))
        _pulls(canvas, recording, row, xs[2] + BARS + GAP, y, max(abs(other.omitted_pull).max() for other in rows if other.omitted_pull is not None))


def _amounts(canvas: Canvas, row: WordRow, x: float, y: float, most: float) -> None:
    """How much moves: left out of the prompt, and hidden from the aggregators only."""
    for place, (amount, what) in enumerate(((row.omitted, "left out of the prompt"), (row.hidden, "hidden from the aggregators only"))):
        at = y + 4 + place * 44
        if amount is None:
            continue
        canvas.block(x, at, (BARS - 90) * amount / (most or 1), 16, MUTED)
        canvas.text(x + (BARS - 90) * amount / (most or 1) + 6, at + 8, f"{amount:.2%}", 13, anchor="lm")
        canvas.text(x, at + 18, what, 12, MUTED)


def _pulls(canvas: Canvas, recording: Recording, row: WordRow, x: float, y: float, most: float) -> None:
    """Bars to the right: the word calls for the expert; to the left: it keeps it away."""
    middle, room = x + BARS / 2, BARS / 2 - 44
    canvas.pen.line((middle, y, middle, y + 22 * len(recording.experts)), fill=LINE)
    assert row.omitted_pull is not None
    for expert, pull in enumerate(row.omitted_pull):
        at, long = y + 3 + expert * 22, room * abs(float(pull)) / (float(most) or 1)
        canvas.block(middle if pull > 0 else middle - long, at, long, 16, colour_of(expert))
        side = "lm" if pull > 0 else "rm"
        canvas.text(middle + (long + 5) * (1 if pull > 0 else -1), at + 8, signed(100 * float(pull)), 12, MUTED, anchor=side)
