"""Measure two kinds of work fairly on a machine that drifts: time in turn, and peak memory."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Work = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of n measurements."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:9.3f}  [{self.low:.3f}, {self.high:.3f}]  n = {self.n}"


class Clock:
    """Times work, and the part of it in watched modules: by the clock, on a GPU by events in its queue, without waiting."""

    def __init__(self, device: str, watched: Sequence[nn.Module] = ()) -> None:
        self.cuda = device == "cuda"
        self.open: list[Any] = []
        self.spans: list[tuple[Any, Any]] = []
        for module in watched:
            module.register_forward_pre_hook(lambda *_: self.open.append(self.mark()))
            module.register_forward_hook(lambda *_: self.spans.append((self.open.pop(), self.mark())))

    def mark(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time(self, work: Work) -> tuple[float, float]:
        """-> seconds that some work took, and those of them spent in what is watched."""
        self.spans.clear()
        start = self.mark()
        work()
        stop = self.mark()
        if self.cuda:
            torch.cuda.synchronize()
        return self.seconds(start, stop), sum(self.seconds(*span) for span in self.spans)

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two points in time."""
        return float(start.elapsed_time(stop)) / 1000 if self.cuda else float(stop - start)


def peak_memory(device: str) -> float:
    """The most memory so far, in GB: resident in the process, or allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def rounds(
    name: str, clock: Clock, singles: Sequence[Work], ensemble: Work, repeats: int
) -> dict[str, Spread]:
    """Experts and ensemble in turn, after one unmeasured round."""
    alone: list[list[float]] = []
    together: list[tuple[float, float]] = []
    for number in range(repeats + 1):
        print(
            f"{name}, round {number} of {repeats}{'' if number else ' (warm-up)'}",
            file=sys.stderr,
            flush=True,
        )
        alone.append([clock.time(work)[0] for work in singles])
        together.append(clock.time(ensemble))
    alone, together = alone[1:], together[1:]
    return {
        "one_expert_seconds": Spread.of([seconds for one in alone for seconds in one]),
        "experts_in_turn_seconds": Spread.of([sum(one) for one in alone]),
        "ensemble_seconds": Spread.of([whole for whole, _ in together]),
        "ensemble_over_experts": Spread.of(
            [whole / sum(one) for one, (whole, _) in zip(alone, together, strict=True)]
        ),
        "aggregators_share": Spread.of([part / whole for whole, part in together]),
    }
