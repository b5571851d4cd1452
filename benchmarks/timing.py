"""Measure two kinds of work fairly on a machine that drifts: time in turn, and peak memory."""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

Work = Callable[[], Any]
EAGER, GRAPH, COMPILED = "eager", "graph", "compiled"


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
    """Times work, and named parts of it: by the clock, on a GPU by events in its queue, without waiting."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = {}

    def watch(self, name: str, module: nn.Module) -> None:
        """Time what a module does."""
        spans, started = self.spans.setdefault(name, []), list[Any]()
        module.register_forward_pre_hook(lambda *_: started.append(self.mark()))
        module.register_forward_hook(lambda *_: spans.append((started.pop(), self.mark())))

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed."""
        spans = self.spans.setdefault(name, [])

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.mark()
            result = function(*args, **kwargs)
            spans.append((start, self.mark()))
            return result

        return timed

    def mark(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time(self, work: Work) -> tuple[float, dict[str, float]]:
        """-> seconds that some work took, and those of them spent in each part."""
        for spans in self.spans.values():
            spans.clear()
        start = self.mark()
        work()
        stop = self.mark()
        if self.cuda:
            torch.cuda.synchronize()
        parts = {name: sum(self.seconds(*span) for span in spans) for name, spans in self.spans.items()}
        return self.seconds(start, stop), parts

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two points in time."""
        return float(start.elapsed_time(stop)) / 1000 if self.cuda else float(stop - start)


def peak_memory(device: str) -> float:
    """The most memory so far, in GB: resident in the process, or allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_turn(works: Sequence[Work]) -> Work:
    """Return all works as one."""
    return lambda: [work() for work in works]


def prepared(work: Work, mode: str) -> Work:
    """Return the work in a mode. Raises RuntimeError for a graph on a CPU."""
    if mode == COMPILED:
        return torch.compile(work)
    if mode == EAGER:
        return work
    if not torch.cuda.is_available():
        raise RuntimeError("only a GPU has graphs")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def rounds(
    name: str, clock: Clock, singles: Sequence[Work], ensemble: Work, repeats: int
) -> dict[str, Spread]:
    """Experts and ensemble in turn, after one unmeasured round; in seconds, and ratios within a round."""
    measured: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats + 1):
        print(
            f"{name}, round {number} of {repeats}{'' if number else ' (warm-up)'}",
            file=sys.stderr,
            flush=True,
        )
        alone = sum(clock.time(work)[0] for work in singles)
        whole, parts = clock.time(ensemble)
        if number:
            measured["experts in turn, s"].append(alone)
            measured["ensemble, s"].append(whole)
            measured["ensemble / experts"].append(whole / alone)
            measured["ensemble / one expert"].append(whole / alone * len(singles))
            for part, seconds in parts.items():
                measured[f"{part} / experts"].append(seconds / alone)
    return {what: Spread.of(values) for what, values in measured.items()}
