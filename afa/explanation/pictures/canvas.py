"""What the pictures are drawn with: words that fit, images at a size, swatches, bars."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from afa.visualise.grid import INK, PAPER
from afa.visualise.weights import COLOURS

Colour = Sequence[int]
MUTED, LINE = (95, 99, 104), (218, 220, 224)
MARGIN = 24


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, the same everywhere."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


def colour_of(expert: int) -> Colour:
    """An expert's colour, by its place; after eight they repeat."""
    return COLOURS[expert % len(COLOURS)]


def fitting(words: str, size: int, width: float) -> str:
    """Words that are no wider than that, cut in the middle: names differ at their ends."""
    own = font(size)
    if own.getlength(words) <= width:
        return words
    for kept in range(len(words) - 1, 1, -1):
        shorter = f"{words[: (kept + 1) // 2]}…{words[len(words) - kept // 2 :]}"
        if own.getlength(shorter) <= width:
            return shorter
    return "…"


def name_width(names: Sequence[str], least: int, most: int) -> int:
    """Room for the longest name in size 15 with a swatch before it."""
    return round(min(most, max(least, 40 + max(font(15).getlength(name) for name in names))))


def wrapped(words: str, size: int, width: float, lines: int = 3) -> list[str]:
    """Words in at most so many lines, each fitting; what does not fit any more ends in dots."""
    own, found = font(size), [""]
    for word in words.split():
        longer = f"{found[-1]} {word}".strip()
        if found[-1] and own.getlength(longer) > width:
            found.append(word)
        else:
            found[-1] = longer
    if len(found) > lines:
        found = [*found[: lines - 1], " ".join(found[lines - 1 :])]
    return [fitting(line, size, width) if own.getlength(line) > width else line for line in found]


class Canvas:
    """A white page to draw on."""

    def __init__(self, width: float, height: float) -> None:
        self.image = Image.new("RGB", (round(width), round(height)), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: int = 14, colour: Colour = INK, anchor: str = "la") -> None:
        """Words at a place; anchor: as Pillow's."""
        self.pen.text((x, y), words, tuple(colour), font(size), anchor=anchor)

    def picture(self, x: float, y: float, pixels: NDArray[np.uint8], width: int, height: int | None = None) -> None:
        """An image (H, W, 3) at that width, in its own proportions unless a height is given; small ones keep hard edges."""
        source = Image.fromarray(pixels)
        height = height or round(width * source.height / source.width)
        method = Image.Resampling.NEAREST if source.width * 2 <= width else Image.Resampling.LANCZOS
        self.image.paste(source.resize((width, height), method), (round(x), round(y)))
        self.frame(x, y, width, height)

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """A thin line around."""
        self.pen.rectangle((x - 1, y - 1, x + width, y + height), outline=LINE)

    def block(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A filled rectangle; nothing if it is narrower than half a pixel."""
        if width >= 0.5:
            self.pen.rectangle((x, y, x + max(0.0, width - 1), y + height - 1), fill=tuple(colour))

    def rule(self, x: float, y: float, width: float) -> None:
        """A horizontal line."""
        self.pen.line((x, y, x + width, y), fill=LINE)


def decimals(value: float) -> str:
    """0.333 -> .33, as a share is read."""
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"


def signed(value: float) -> str:
    """+0.8, -0.4, and 0.0 without a sign."""
    found = f"{value:+.1f}"
    return found if found.strip("+-0.") else "0.0"
