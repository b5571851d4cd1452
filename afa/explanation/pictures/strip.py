"""The animated strip: step after step, what the ensemble believes in and who weighs where."""

from pathlib import Path

import numpy as np
from PIL import Image

from afa.explanation.pictures.canvas import LINE, MARGIN, MUTED, Canvas, colour_of, fitting
from afa.explanation.recording import FRAMES, Recording
from afa.explanation.shares import lead_at, weights_at
from afa.visualise.grid import INK
from afa.visualise.weights import heat

TILE, GAP = 160, 10
MILLISECONDS, REST = 250, 1500  # a frame; the last one stays longer


def frames(recording: Recording) -> list[Image.Image]:
    """One an image that was drawn on the way, at most FRAMES; where none could be, the final image stands in all."""
    count = len(recording.timesteps)
    spread = np.unique(np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int))
    passes = sorted(recording.drawn) or [int(index) for index in spread]
    return [frame(recording, index) for index in passes]


def frame(recording: Recording, index: int) -> Image.Image:
    """Of one pass: the step, the image believed in, its overlay, every expert's weights."""
    tile = TILE if len(recording.experts) <= 4 else 120
    image = recording.drawn.get(index, recording.image)
    high = round(tile * image.shape[0] / image.shape[1])
    tiles = [(image, "the image so far" if recording.drawn else "the final image"), (lead_at(recording, index), "who weighs more")]
    weights = weights_at(recording, index)
    canvas = Canvas(2 * MARGIN + (len(tiles) + len(weights)) * (tile + GAP) - GAP + GAP, 64 + high + 52)
    _progress(canvas, recording, index)
    for place, (pixels, caption) in enumerate(tiles):
        x = MARGIN + place * (tile + GAP)
        canvas.picture(x, 64, pixels, tile, high)
        canvas.text(x, 64 + high + 8, fitting(caption, 14, tile), 14)
    for expert, own in enumerate(weights):
        x = MARGIN + (len(tiles) + expert) * (tile + GAP) + GAP
        canvas.picture(x, 64, heat(own, colour_of(expert)), tile, high)
        canvas.block(x, 64 + high + 9, 14, 14, colour_of(expert))
        canvas.text(x + 20, 64 + high + 8, fitting(recording.experts[expert], 14, tile - 56), 14)
        canvas.text(x + tile, 64 + high + 8, f"{float(own.mean()):.0%}", 14, MUTED, anchor="ra")
    return canvas.image


def _progress(canvas: Canvas, recording: Recording, index: int) -> None:
    count, width = len(recording.timesteps), canvas.image.width - 2 * MARGIN
    canvas.text(MARGIN, 12, f"step {index + 1} of {count}", 16)
    canvas.text(MARGIN + width, 14, f"t = {recording.timesteps[index]:.0f}", 14, MUTED, anchor="ra")
    canvas.block(MARGIN, 42, width, 5, LINE)
    canvas.block(MARGIN, 42, width * (index + 1) / count, 5, INK)


def save_strip(recording: Recording, path: Path) -> None:
    """An endless animated WebP."""
    pictures = frames(recording)
    durations = [*[MILLISECONDS] * (len(pictures) - 1), REST]
    pictures[0].save(path, format="WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=82, method=4)
