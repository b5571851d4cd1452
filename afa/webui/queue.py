"""The runs of the page: their state, their cancellation, and the queue before the device."""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from afa.errors import UserError
from afa.generation.prompt_loras import PromptLoras
from afa.webui.request_validation import RunRequest

REFRESH = 0.15  # seconds between updates of a running job


class Cancelled(Exception):  # noqa: N818 - a request of the visitor, not an error
    """Ends a run between two steps."""


@dataclass(frozen=True)
class GalleryPicture:
    """A picture of a run.

    path:     of the PNG in the gallery
    seed:     of its noise
    metadata: how it was made
    kept:     whether it existed before the run
    """

    path: Path
    seed: int
    metadata: dict[str, Any]
    kept: bool


@dataclass
class MethodColumn:
    """The pictures of one method in a run.

    method:   its name
    title:    its title on the page
    pictures: made so far
    seconds:  time for the pictures that did not exist before
    error:    why the method stopped; "" if it did not fail
    done:     whether nothing more will be made
    """

    method: str
    title: str
    pictures: list[GalleryPicture] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    done: bool = False


@dataclass
class DrawingJob:
    """A run and its state.

    request:   what the visitor asked for
    columns:   one for each method
    strengths: expert -> factor; read at every stage of every step, and may change during the run
    loras:     that the prompt names
    """

    request: RunRequest
    columns: list[MethodColumn]
    strengths: dict[str, float]
    loras: PromptLoras
    state: Literal["waiting", "running", "done", "cancelled", "refused"] = "waiting"
    at: tuple[int, int] = (0, 0)  # completed and total steps of the current picture
    stopped: threading.Event = field(default_factory=threading.Event)
    preview: NDArray[np.uint8] | None = None  # of the current picture
    previews: int = 0  # how many there were
    pace: float | None = None  # seconds of a step
    _first: tuple[int, float] = (0, 0.0)  # steps of the current picture at a time of its own

    def cancel(self) -> None:
        """Stop after the current step."""
        self.stopped.set()

    def on_step(self, done: int, steps: int) -> None:
        """Note the completed steps. Raises Cancelled if the run was cancelled."""
        now = time.monotonic()
        if (
            done <= self.at[0] or self.at[0] == 0
        ):  # another picture; its first step may have waited for memory
            self._first = (done, now)
        elif done > self._first[0]:
            self.pace = (now - self._first[1]) / (done - self._first[0])
        self.at = (done, steps)
        self.check()

    def show(self, preview: NDArray[np.uint8]) -> None:
        """Show a preview of the current picture: (h, w, 3) uint8."""
        self.preview, self.previews = preview, self.previews + 1

    @property
    def seconds_left(self) -> float | None:
        """The time that the remaining steps take at the pace of the latest ones; None before there is one."""
        if self.pace is None or self.current is None:
            return None
        missing = sum(
            self.request.images - len(column.pictures) for column in self.columns if not column.done
        )
        return self.pace * (self.at[1] * missing - self.at[0])

    def check(self) -> None:
        """Raise Cancelled if the run was cancelled."""
        if self.stopped.is_set():
            raise Cancelled

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.state in ("done", "cancelled", "refused")

    @property
    def current(self) -> MethodColumn | None:
        """The column whose pictures are being made."""
        return (
            None
            if self.state != "running"
            else next((column for column in self.columns if not column.done), None)
        )

    @property
    def mark(self) -> tuple[Any, ...]:
        """A value that changes whenever the pictures or the state change."""
        return (
            self.state,
            self.previews,
            *((len(column.pictures), column.error, column.done) for column in self.columns),
        )


def follow(work: Callable[[DrawingJob], None], job: DrawingJob) -> Iterator[None]:
    """Do the work in a thread, and yield while it runs.

    Closing the iterator cancels the job. Raises what the work raises.
    """
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
    """Return the sentence for an unexpected error, and print its traceback in the terminal."""
    traceback.print_exception(error, file=sys.stderr)
    what = f"there was an unexpected error ({type(error).__name__})"
    return f"{what}; the terminal of afa ui shows more, and the page keeps running"


PATIENCE = 0.1  # seconds between checks for cancelled jobs in the queue


class RunQueue:
    """The queue before the device, on which one job runs at a time.

    waiting: the largest number of waiting jobs, besides the running one
    """

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._line: deque[DrawingJob] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, job: DrawingJob) -> Iterator[None]:
        """Wait for the device; no other job runs inside the context.

        Raises UserError if the queue is full, and Cancelled if the job is cancelled while it waits.
        """
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
        """Return the number of jobs before this one."""
        line = list(self._line)
        return next((place for place, other in enumerate(line) if other is job), 0)

    def empty(self, seconds: float) -> bool:
        """Wait until the queue is empty, at most so many seconds; return whether it is."""
        with self._moved:
            return self._moved.wait_for(lambda: not self._line, seconds)
