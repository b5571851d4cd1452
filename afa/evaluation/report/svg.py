"""What plots are drawn with: scales, ticks, marks. Colours are the page's, by class; every kind of method has a shape too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from afa.evaluation.report.numbers import MINUS

STAR = [
    (5.8 * size * math.sin(k * math.pi / 5), -5.8 * size * math.cos(k * math.pi / 5))
    for k in range(10)
    for size in (1 - 0.55 * (k % 2),)
]
SHAPES = {
    "expert": '<circle r="4.4"/>',
    "merge": '<rect x="-4" y="-4" width="8" height="8"/>',
    "sampling": '<path d="M0-5.2 5 4.2H-5z"/>',
    "control": '<path d="M0-5.6 5.6 0 0 5.6-5.6 0z"/>',
    "ours": f'<path d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in STAR)}z"/>',
    "bound": '<path class="open" d="M-4-4 4 4M-4 4 4-4"/>',
}


@dataclass(frozen=True)
class Scale:
    """Numbers to places: low and high of the data become start and end of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(part) if self.log else part for part in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def scale(values: Sequence[float], start: float, end: float, log: bool = False, room: float = 0.05) -> Scale:
    """Around all values, with some room at both ends."""
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** room if high > low else 1.5
        return Scale(low / factor, high * factor, start, end, True)
    apart = (high - low) * room if high > low else abs(low) * 0.1 or 1.0
    return Scale(low - apart, high + apart, start, end)


def ticks(over: Scale, count: int = 6) -> list[float]:
    """About so many round numbers within a scale: 1, 2 or 5 times a power of ten."""
    if over.log:
        return _log_ticks(over.low, over.high)
    rough = (over.high - over.low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first, last = math.ceil(over.low / step - 1e-9), math.floor(over.high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for sizes in ((1.0,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [round(size * 10.0**power, 12) for power in powers for size in sizes if low <= size * 10.0**power <= high]
        if len(found) >= 4:
            return found
    return found or [low, high]


def tick_label(value: float) -> str:
    """As short as it can be said."""
    return f"{value:.6g}".replace("-", MINUS)


def text(x: float | str, y: float | str, words: str, kind: str = "label", anchor: str = "start") -> str:
    """Words at a place. kind: label, tick or axis."""
    return f'<text x="{_at(x)}" y="{_at(y)}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float | str, y1: float | str, x2: float | str, y2: float | str, kind: str) -> str:
    """A line of a class: grid, zero, whisker, leader …"""
    return f'<line x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}" class="{kind}"/>'


def mark(x: float, y: float, group: str, tip: str = "") -> str:
    """The shape of a group in its colour; tip: shown under the pointer."""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<g transform="translate({_at(x)} {_at(y)})" class="mark {group}">{title}{SHAPES[group]}</g>'


def drawing(width: float, height: float, parts: Sequence[str], description: str) -> str:
    """A whole plot, as wide as its place. description: for those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description, quote=True)}" class="plot"'
        f' style="min-width:{0.8 * width:g}px;max-width:{1.1 * width:g}px">{"".join(parts)}</svg>'
    )


def _at(place: float | str) -> str:
    return place if isinstance(place, str) else f"{place:.1f}"
