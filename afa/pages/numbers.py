"""Numbers for people: as many digits as the interval carries, a true minus sign, units that fit."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from afa.stats import Estimate

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"  # where there is nothing to show
MOST = 6  # decimals
DECIMAL = ("", "k", "M", "G", "T", "P")


def decimals(estimates: "Sequence[Estimate]") -> int:
    """Digits after the point of a column: they show two digits of a usual interval's half width."""
    widths = [(one.high - one.low) / 2 for one in estimates if one.high > one.low]
    if not widths:
        return 3
    return min(MOST, max(0, 1 - math.floor(math.log10(statistics.median(widths)))))


def number(value: float, places: int, signed: bool = False) -> str:
    """0.123, or +0.123; minus zero is zero."""
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(estimate: "Estimate", places: int, signed: bool = False, scale: float = 1) -> str:
    """[low, high]; "" where there is no interval. scale: a factor, 100 for percent."""
    if not estimate.has_interval:
        return ""
    low, high = (number(scale * end, places, signed) for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def with_interval(estimate: "Estimate", places: int, signed: bool = False) -> str:
    """0.123 [0.120, 0.126]"""
    return f"{number(estimate.value, places, signed)} {interval(estimate, places, signed)}".strip()


def probability(p: float) -> str:
    """0.012, or < 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


@overload
def count(value: int) -> str: ...
@overload
def count(value: None) -> None: ...
def count(value: int | None) -> str | None:
    """1234567 -> "1,234,567"."""
    return None if value is None else f"{value:,}"


def plural(number_of: int, word: str) -> str:
    """3, "prompt" -> "3 prompts"."""
    return f"{count(number_of)} {word}{'' if number_of == 1 else 's'}"


def scaled(value: float | None, unit: str) -> str | None:
    """1234567890, "B" -> "1.235 GB" (decimal, four digits)."""
    if value is None:
        return None
    step = 0
    while abs(value) >= 999.95 and step < len(DECIMAL) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.4g} {DECIMAL[step]}{unit}"


def durations(seconds: Sequence[float]) -> str:
    """The mean of some times and [smallest, largest], in the unit that fits: seconds, minutes or hours."""
    mean = sum(seconds) / len(seconds)
    size, unit = (1, "s") if mean < 600 else (60, "min") if mean < 36_000 else (3600, "h")
    ends = f" [{min(seconds) / size:.0f}, {max(seconds) / size:.0f}]" if len(seconds) > 1 else ""
    return f"{mean / size:.0f}{ends} {unit}"
