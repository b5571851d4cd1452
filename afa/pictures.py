"""Pictures about images: grids, weight maps over images, and the canvas of an explanation's pictures."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from afa.denoiser.hooks import WeightMaps

# One colour an expert, told apart by most kinds of colour vision. Source: Okabe and Ito (2008).
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
    (240, 228, 66),
    (90, 90, 90),
)
Colour = Sequence[int]
MARGIN = 24


@dataclass(frozen=True)
class Ground:
    """What a picture is drawn on.

    paper: the ground, which stands for a weight of 0
    name:  of the ground, in words
    ink:   of text; muted: of small text; line: of thin lines; quiet: of a cell that is crossed out
    suffix: of the name of a picture's file
    """

    name: str
    paper: Colour
    ink: Colour
    muted: Colour
    line: Colour
    quiet: Colour
    suffix: str = ""


LIGHT = Ground("white", (255, 255, 255), (32, 33, 36), (95, 99, 104), (218, 220, 224), (241, 243, 244))
# As in pages/templates/style.css.
DARK = Ground("black", (20, 23, 27), (228, 232, 236), (155, 166, 177), (49, 56, 64), (39, 45, 52), ".dark")
INK, PAPER = LIGHT.ink, LIGHT.paper


# --- grids ---


def grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    side: int | None = None,
    gap: int = 4,
    ground: Ground = LIGHT,
) -> Image.Image:
    """Arrange images (H, W, 3) uint8 row by row.

    columns: names above; labels: at the left; each may have several lines. side: cell width.
    ground: what it is drawn on.
    """
    height, width = rows[0][0].shape[:2]
    width, height = (width, height) if side is None else (side, round(side * height / width))
    own = font(label_size(width))
    lines = [line for label in labels for line in label.split("\n")]
    left = round(max(map(own.getlength, lines), default=0)) + (12 if labels else 0)
    top = round(own.size * (0.6 + 1.2 * max(name.count("\n") + 1 for name in columns))) if columns else 0
    count = max(map(len, rows))
    sheet = Image.new(
        "RGB",
        (left + count * (width + gap) - gap, top + len(rows) * (height + gap) - gap),
        tuple(ground.paper),
    )
    pen, ink = ImageDraw.Draw(sheet), tuple(ground.ink)
    for index, name in enumerate(columns):
        pen.text((left + index * (width + gap) + width / 2, top / 2), name, ink, own, anchor="mm")
    for row, images in enumerate(rows):
        y = top + row * (height + gap)
        if labels:
            pen.text((left - 8, y + height / 2), labels[row], ink, own, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(_fit(image, width, height), (left + column * (width + gap), y))
    return sheet


def label_size(width: int) -> int:
    """Return the size of a grid's labels. width: of its cells in pixels"""
    return max(11, min(20, width // 10))


def _fit(image: NDArray[np.uint8], width: int, height: int) -> Image.Image:
    """Enlarge a picture: with hard edges for whole factors (small ones stay legible), else smoothly."""
    picture = Image.fromarray(image)
    if picture.size == (width, height):
        return picture
    whole = width % picture.width == 0 and height % picture.height == 0
    return picture.resize((width, height), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


# --- weight maps ---


def conditional(maps: WeightMaps, images: int) -> list[dict[str, Tensor]]:
    """Return the maps of the half with the prompt, by pass and stage: (images, N, H, W)."""
    rows = slice(images) if maps.prompt_first else slice(-images, None)
    return [{name: weights[rows] for name, weights in one.items()} for one in maps.maps]


def mean_over_stages(maps: dict[str, Tensor], side: tuple[int, int]) -> Tensor:
    """One map of a pass: the mean over fused stages, each brought to `side` (H, W).

    -> (B, N, H, W), still convex.
    """
    resized = [
        torch.nn.functional.interpolate(weights, size=side, mode="bilinear", align_corners=False)
        for weights in maps.values()
    ]
    return torch.stack(resized).mean(0)


def overlay(image: NDArray[np.uint8], weights: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Tint an image by the experts' colours: image (H, W, 3), weights (N, H, W) convex -> (H, W, 3) uint8."""
    palette = np.asarray(COLOURS, np.float32)
    tint = np.einsum("nhw,nc->hwc", weights, palette[np.arange(len(weights)) % len(palette)])
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    return np.clip(0.35 * grey + 0.65 * tint * (0.4 + 0.6 * grey / 255), 0, 255).astype(np.uint8)


def heat(weights: NDArray[np.floating], colour: Colour, ground: Ground = LIGHT) -> NDArray[np.uint8]:
    """One expert's weights (H, W) in [0, 1]: ground is 0, the expert's colour 1. -> (H, W, 3) uint8."""
    empty, full = np.asarray(ground.paper, np.float32), np.asarray(colour, np.float32)
    return (empty - (empty - full) * np.clip(weights, 0, 1)[..., None]).astype(np.uint8)


def picture(
    image: NDArray[np.uint8],
    maps: Sequence[dict[str, Tensor]],
    experts: Sequence[str],
    timesteps: Sequence[float],
    ground: Ground = LIGHT,
) -> Image.Image:
    """Draw one image's weights: a row per expert, a column per shown step, the last over the whole image.

    maps: of this image, by pass and stage, (N, h, w); ground: what it is drawn on.
    """
    side = image.shape[:2]
    shown = np.linspace(0, len(maps) - 1, min(5, len(maps))).round().astype(int)
    over_steps = [
        mean_over_stages({name: w[None] for name, w in maps[index].items()}, side)[0].numpy()
        for index in range(len(maps))
    ]
    rows = []
    for index in range(len(experts)):
        rows.append([heat(over_steps[step][index], colour_of(index), ground) for step in shown])
    mean = np.mean(over_steps, axis=0)
    rows[0] += [image]
    if len(rows) > 1:
        rows[1] += [overlay(image, mean)]
    columns = [f"t = {timesteps[step]:.0f}" for step in shown] + ["image, weights"]
    return grid(
        rows,
        columns=columns,
        labels=[f"{name} {mean[index].mean():.2f}" for index, name in enumerate(experts)],
        side=max(128, side[1]),
        ground=ground,
    )


# --- what an explanation's pictures are drawn with ---


@cache
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

    def cut(kept: int) -> str:
        return f"{words[: (kept + 1) // 2]}…{words[len(words) - kept // 2 :]}"

    counts = range(2, len(words))
    fit = bisect_right(counts, width, key=lambda kept: own.getlength(cut(kept)))
    return cut(counts[fit - 1]) if fit else "…"


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
    """A page to draw on."""

    def __init__(self, width: float, height: float, ground: Ground = LIGHT) -> None:
        self.ground = ground
        self.image = Image.new("RGB", (round(width), round(height)), tuple(ground.paper))
        self.pen = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, words: str, size: int = 14, muted: bool = False, anchor: str = "la"
    ) -> None:
        """Write words at a place; anchor: as Pillow's."""
        colour = tuple(self.ground.muted if muted else self.ground.ink)
        self.pen.text((x, y), words, colour, font(size), anchor=anchor)

    def lines(
        self, x: float, y: float, lines: Sequence[str], step: int, size: int, muted: bool = False
    ) -> None:
        """Write lines of text; step: pixels from one line to the next."""
        for place, line in enumerate(lines):
            self.text(x, y + step * place, line, size, muted)

    def picture(
        self, x: float, y: float, pixels: NDArray[np.uint8], width: int, height: int | None = None
    ) -> None:
        """Draw an image (H, W, 3) at that width, in its proportions unless a height is given."""
        source = Image.fromarray(pixels)
        height = height or round(width * source.height / source.width)
        method = Image.Resampling.NEAREST if source.width * 2 <= width else Image.Resampling.LANCZOS
        self.image.paste(source.resize((width, height), method), (round(x), round(y)))
        self.frame(x, y, width, height)

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """A thin line around."""
        self.pen.rectangle((x - 1, y - 1, x + width, y + height), outline=tuple(self.ground.line))

    def block(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A filled rectangle; nothing if it is narrower than half a pixel."""
        if width >= 0.5:
            self.pen.rectangle((x, y, x + max(0.0, width - 1), y + height - 1), fill=tuple(colour))

    def rule(self, x: float, y: float, width: float) -> None:
        """A horizontal line."""
        self.pen.line((x, y, x + width, y), fill=tuple(self.ground.line))
