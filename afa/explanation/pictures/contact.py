"""The contact sheet: the image, and what it would have been."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.explanation.causes import Counterfactual
from afa.explanation.pictures.canvas import MARGIN, MUTED, Canvas, fitting, wrapped

TILE, GAP, ROW = 168, 20, 5


def contact(prompt: str, image: NDArray[np.uint8], others: Sequence[Counterfactual]) -> Image.Image:
    """All from the same noise; under each, what was changed and how far it is from the image as it is."""
    high = round(TILE * image.shape[0] / image.shape[1])
    columns = min(ROW, len(others) + 1)
    lines = -(-(len(others) + 1) // columns)
    width = max(2 * MARGIN + columns * (TILE + GAP) - GAP, 560)
    canvas = Canvas(width, 66 + lines * (high + 74) + 10)
    canvas.text(MARGIN, 20, fitting(prompt, 20, width - 2 * MARGIN), 20)
    tiles = [(image, "as it is", ""), *((other.image, other.title, f"{other.rmse:.1f} of 255 away (RMSE)") for other in others)]
    for place, (pixels, title, distance) in enumerate(tiles):
        x, y = MARGIN + place % columns * (TILE + GAP), 66 + place // columns * (high + 74)
        canvas.picture(x, y, pixels, TILE, high)
        found = wrapped(title, 14, TILE, 2)
        for index, line in enumerate(found):
            canvas.text(x, y + high + 7 + 18 * index, line, 14)
        canvas.text(x, y + high + 8 + 18 * len(found), distance, 12, MUTED)
    return canvas.image
