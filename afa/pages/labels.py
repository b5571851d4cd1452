"""Where the labels of a chart stand: none on another, whatever their number and length."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

LETTER, LINE, NEAR = 6.6, 14.0, 9.0  # pixels: width of a letter, height of a line, from a point to its label
CAPITAL, BROAD = 10.0, 13.0  # pixels: width of a capital letter, and of one as wide as it is high
GAP = 8.0  # pixels between two labels of an axis
MOST = 40  # letters of a label
# Where a label may stand, from its point, the best first: beside it, further up or down, further out.
HEIGHTS = (0, *(sign * step for step in range(7, 92, 7) for sign in (-1, 1)))
STEPS = [(out, up) for out in (0, 22, 48, 80) for up in HEIGHTS]


def width_of(words: str) -> float:
    """About how wide a label is, in pixels; hardly ever less than it is drawn."""
    broad = {"W", "F"}
    return sum(
        BROAD if unicodedata.east_asian_width(letter) in broad else CAPITAL if letter.isupper() else LETTER
        for letter in words
    )


def shortened(words: str, most: int = MOST) -> str:
    """A label of at most so many letters, cut in the middle: names differ at their ends."""
    return words if len(words) <= most else f"{words[: most // 2]}…{words[len(words) - most // 2 + 1 :]}"


def thinned(places: Mapping[float, str]) -> dict[float, str]:
    """Every label of an axis, or every second, third …, so that none touches the next.

    places: x of the middle -> text
    """
    found = [(x, places[x], width_of(places[x]) / 2) for x in sorted(places)]
    for every in range(1, len(found) + 1):
        kept = found[::every]
        pairs = pairwise(kept)
        if all(right[0] - right[2] - left[0] - left[2] >= GAP for left, right in pairs):
            return {x: words for x, words, _ in kept}
    return {}


def stacked(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places for lines of text at least LINE apart, each as near to its own height as there is room.

    heights: ascending
    top:     of the first line
    bottom:  of the last one, as long as all fit
    """
    step, found = LINE + 1, list[float]()
    for height in heights:
        found.append(max(height, found[-1] + step if found else top))
    limit = max(bottom, top + step * (len(found) - 1))
    for place in reversed(range(len(found))):
        found[place] = min(found[place], limit - step * (len(found) - 1 - place))
    return found


@dataclass(frozen=True)
class Box:
    """A rectangle of the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """The area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Label:
    """A placed label. x, y: of its text's beginning or end; far: whether it needs a line to its point."""

    x: float
    y: float
    anchor: str
    far: bool
    box: Box


Words = tuple[float, float, str]  # x, y and what stands there


def place_labels(points: Sequence[Words], obstacles: Sequence[Box], field: Box) -> list[Label]:
    """Place a label for each point; the first ones get the best places.

    points:    x, y and text
    obstacles: what labels should not cover, such as intervals
    field:     where labels may be
    A label covers no other label and no point as long as there is room.
    """
    marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    placed: list[Label] = []

    def cost(label: Label, step: int) -> float:
        """How bad a place is: other labels and the border most, then points, intervals, distance."""
        box = label.box
        outside = (box.right - box.left) * (box.bottom - box.top) - box.overlap(field)
        labels = sum(box.overlap(other.box) for other in placed)
        over = 30 * sum(map(box.overlap, marks)) + 2 * sum(map(box.overlap, obstacles))
        return 1000 * (outside + labels) + over + 1.5 * step

    for x, y, words in points:
        candidates = []
        for (out, up), side in ((place, side) for place in STEPS for side in (1, -1)):
            width, near = width_of(words), x + side * (NEAR + out)
            left, right = (near, near + width) if side > 0 else (near - width, near)
            box = Box(left, y + up - LINE / 2, right, y + up + LINE / 2)
            anchor, far = "start" if side > 0 else "end", bool(out) or abs(up) > 7
            candidates.append(Label(near, y + up + 4, anchor, far, box))
        costs = [cost(label, step) for step, label in enumerate(candidates)]
        placed.append(candidates[min(range(len(costs)), key=costs.__getitem__)])
    return placed


# --- forest: differences with their intervals, one under the other ---
