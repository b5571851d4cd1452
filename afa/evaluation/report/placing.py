"""Labels next to their points without lying on each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from afa.evaluation.report.svg import line, text

LETTER, LINE = 6.6, 14.0  # width of a letter and height of a line, in pixels of the drawing
NEAR = 9.0  # from a point to its label
# Where a label may stand, from its point, the best first: beside it, then further up or down, then further out.
STEPS = [(out, up) for out in (0, 22, 48, 80) for up in (0, *(sign * step for step in range(7, 92, 7) for sign in (-1, 1)))]


@dataclass(frozen=True)
class Box:
    """A rectangle of the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """The area two boxes share."""
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


def place_labels(points: Sequence[tuple[float, float, str]], obstacles: Sequence[Box], field: Box) -> list[Label]:
    """A label for each point (x, y, words), those that come first placed best.

    obstacles: what should not be written over, such as intervals; field: where labels may be. A label lies on no other label
    and on no point as long as there is any room.
    """
    marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    placed: list[Label] = []
    for x, y, words in points:
        candidates = [_label(x, y, words, side, out, up) for out, up in STEPS for side in (1, -1)]
        costs = [_cost(label, place, placed, marks, obstacles, field) for place, label in enumerate(candidates)]
        placed.append(candidates[min(range(len(costs)), key=costs.__getitem__)])
    return placed


def _label(x: float, y: float, words: str, side: int, out: float, up: float) -> Label:
    width, near = LETTER * len(words), x + side * (NEAR + out)
    left, right = (near, near + width) if side > 0 else (near - width, near)
    box = Box(left, y + up - LINE / 2, right, y + up + LINE / 2)
    return Label(near, y + up + 4, "start" if side > 0 else "end", bool(out) or abs(up) > 7, box)


def _cost(label: Label, place: int, placed: Sequence[Label], marks: Sequence[Box], obstacles: Sequence[Box], field: Box) -> float:
    """How bad a place is: other labels and the border most, then points, then intervals, then distance."""
    box = label.box
    area = (box.right - box.left) * (box.bottom - box.top)
    outside = area - box.overlap(field)
    labels = sum(box.overlap(other.box) for other in placed)
    points = sum(box.overlap(mark) for mark in marks)
    return 1000 * (outside + labels) + 30 * points + 2 * sum(box.overlap(other) for other in obstacles) + 1.5 * place


def names_beside(ends: Sequence[tuple[float, str, str]], right: float, top: float) -> list[str]:
    """Names of lines right of where they end, pushed apart where they would lie on each other.

    ends: y, name and class of each. right: where the lines end; top: of the field.
    """
    parts: list[str] = []
    lowest = top - LINE
    for y, name, group in sorted(ends):
        lowest = max(y, lowest + LINE + 1)
        parts += [line(right + 2, y, right + 14, lowest, "leader"), text(right + 18, lowest + 4, name, f"label {group}")]
    return parts
