"""The runs of the page: their state, how they are stopped, and the queue in which they wait for the device."""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from afa.errors import UserError
from afa.webui.request_validation import RunRequest

REFRESH = 0.15  # seconds between looks at a run that goes on


class Cancelled(Exception):  # noqa: N818 - no error: somebody wanted it
    """Ends a run between two steps."""


@dataclass(frozen=True)
class GalleryPicture:
    """One that is made. kept: whether it was there already."""

    path: Path
    seed: int
    metadata: dict[str, Any]
    kept: bool


@dataclass
class MethodColumn:
    """What one method makes. seconds: of the pictures made now. error: why there are no more."""

    method: str
    title: str
    pictures: list[GalleryPicture] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    done: bool = False


@dataclass
class DrawingJob:
    """A run and its state. strengths: read at every stage of every step, and may be changed meanwhile."""

    request: RunRequest
    columns: list[MethodColumn]
    strengths: dict[str, float]
    state: Literal["waiting", "running", "done", "cancelled", "refused"] = "waiting"
    at: tuple[int, int] = (0, 0)  # the step that is done last, of how many, of the picture that is being made
    stopped: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop after the step that is being made."""
        self.stopped.set()

    def on_step(self, done: int, steps: int) -> None:
        """Told after every step. Raises Cancelled if the run shall stop."""
        self.at = (done, steps)
        self.check()

    def check(self) -> None:
        """Raises Cancelled if the run shall stop."""
        if self.stopped.is_set():
            raise Cancelled

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ("done", "cancelled", "refused")

    @property
    def current(self) -> MethodColumn | None:
        """The column that is being filled."""
        return (
            None
            if self.state != "running"
            else next((column for column in self.columns if not column.done), None)
        )

    @property
    def mark(self) -> tuple[Any, ...]:
        """Differs whenever the pictures do."""
        return (self.state, *((len(column.pictures), column.error, column.done) for column in self.columns))


def follow(work: Callable[[DrawingJob], None], job: DrawingJob) -> Iterator[None]:
    """Do the work beside, and yield while it goes on. Whoever stops listening stops the run. Raises what the work raises."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work, job)
        try:
            while not done.done():
                wait([done], REFRESH)
                yield
        finally:
            job.cancel()
        done.result()


def unexpected(error: Exception) -> str:
    """The sentence for what nobody foresaw; all about it goes to the terminal."""
    traceback.print_exception(error, file=sys.stderr)
    return f"something went wrong that should not ({type(error).__name__}); the terminal that runs afa ui says more, and the page goes on"


PATIENCE = 0.1  # seconds between looks at whether somebody in line has given up


class RunQueue:
    """A line before the device. waiting: runs that may stand in it besides the one that goes on."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._line: deque[DrawingJob] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, job: DrawingJob) -> Iterator[None]:
        """Inside, nobody else draws. Raises UserError if the line is full, Cancelled if the run is stopped while it waits."""
        with self._moved:
            if len(self._line) > self.waiting:
                many = "1 run is" if self.waiting == 1 else f"{self.waiting} runs are"
                raise UserError(
                    f"{many} waiting already, as many as may (afa ui --queue); try again when one is done"
                )
            self._line.append(job)
        try:
            with self._moved:
                while self._line[0] is not job:
                    self._moved.wait(PATIENCE)
                    job.check()
            yield
        finally:
            with self._moved:
                self._line.remove(job)
                self._moved.notify_all()

    def before(self, job: DrawingJob) -> int:
        """How many runs come before this one."""
        line = list(self._line)
        return next((place for place, other in enumerate(line) if other is job), 0)

    def empty(self, seconds: float) -> bool:
        """Wait until nobody is there: whether it came to that in time."""
        with self._moved:
            return self._moved.wait_for(lambda: not self._line, seconds)
