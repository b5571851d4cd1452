"""Grids of images with labels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (32, 33, 36), (255, 255, 255)


def grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    side: int | None = None,
    gap: int = 4,
) -> Image.Image:
    """Images (H, W, 3) uint8, row by row; columns: names above, labels: names left of a row; side: width of a cell in pixels."""
    height, width = rows[0][0].shape[:2]
    width, height = (width, height) if side is None else (side, round(side * height / width))
    font = ImageFont.load_default(max(11, min(20, width // 10)))
    left = round(max((font.getlength(label) for label in labels), default=0)) + (12 if labels else 0)
    top = round(font.size * 1.8) if columns else 0
    count = max(map(len, rows))
    sheet = Image.new("RGB", (left + count * (width + gap) - gap, top + len(rows) * (height + gap) - gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, name in enumerate(columns):
        pen.text((left + index * (width + gap) + width / 2, top / 2), name, INK, font, anchor="mm")
    for row, images in enumerate(rows):
        y = top + row * (height + gap)
        if labels:
            pen.text((left - 8, y + height / 2), labels[row], INK, font, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(_fit(image, width, height), (left + column * (width + gap), y))
    return sheet


def _fit(image: NDArray[np.uint8], width: int, height: int) -> Image.Image:
    """Enlarged with hard edges where the factor is whole (small pictures stay legible), smoothly otherwise."""
    picture = Image.fromarray(image)
    if picture.size == (width, height):
        return picture
    whole = width % picture.width == 0 and height % picture.height == 0
    return picture.resize((width, height), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
