"""Tables of timestep intervals: 1000-700:curves,700-0:angles."""

from collections.abc import Sequence
from dataclasses import dataclass

from afa.errors import UserError
from afa.lookup import unknown


@dataclass(frozen=True)
class Interval:
    """The timesteps start > t >= end belong to one expert."""

    start: int
    end: int
    expert: str

    def __str__(self) -> str:
        return f"{self.start}-{self.end}:{self.expert}"


def equal_intervals(names: Sequence[str], steps: int) -> list[Interval]:
    """The timesteps 0 … steps-1 in equal parts, the first expert where there is most noise."""
    bounds = [round(steps * (len(names) - place) / len(names)) for place in range(len(names) + 1)]
    return [Interval(start, end, name) for start, end, name in zip(bounds[:-1], bounds[1:], names, strict=True)]


def read_table(text: str, names: Sequence[str], steps: int) -> list[Interval]:
    """Intervals from noise to image that cover the timesteps 0 … steps-1 once. Raises UserError if they do not."""
    intervals = sorted((_read(entry.strip(), names) for entry in text.split(",")), key=lambda interval: -interval.start)
    expected = steps
    for interval in intervals:
        if interval.start > expected:
            other = f"{steps} timesteps" if expected == steps else "the interval before it"
            raise UserError(f"table {text}: {interval} overlaps {other}; it must start at {expected}")
        if interval.start < expected:
            raise UserError(f"table {text}: nobody is there for {expected}-{interval.start}; {interval} must start at {expected}")
        expected = interval.end
    if expected > 0:
        raise UserError(f"table {text}: nobody is there for {expected}-0; the last interval must end at 0")
    return intervals


def at(intervals: Sequence[Interval], timestep: float) -> Interval:
    """The interval of a timestep, which may be a fraction."""
    return next((interval for interval in intervals if timestep >= interval.end), intervals[-1])


def _read(text: str, names: Sequence[str]) -> Interval:
    span, _, name = text.partition(":")
    start, _, end = span.partition("-")
    if not (start.strip().isdecimal() and end.strip().isdecimal() and int(start) > int(end) and name):
        raise UserError(f"table entry '{text}' is no interval; write FROM-TO:EXPERT with whole timesteps, FROM above TO, e.g. 1000-700:{names[0]}")
    if name not in names:
        raise UserError(unknown(name, names, "expert"))
    return Interval(int(start), int(end), name)
