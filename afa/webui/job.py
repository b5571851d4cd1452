"""One run of the page: what it has made so far, what is being made, and how it is stopped."""

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from afa.webui.order import Order

REFRESH = 0.15  # seconds between looks at a run that goes on


class Cancelled(Exception):  # noqa: N818 - no error: somebody wanted it
    """Ends a run between two steps."""


@dataclass(frozen=True)
class Picture:
    """One that is made. kept: whether it was there already."""

    path: Path
    seed: int
    metadata: dict[str, Any]
    kept: bool


@dataclass
class Column:
    """What one method makes. seconds: of the pictures made now. error: why there are no more."""

    method: str
    title: str
    pictures: list[Picture] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    done: bool = False


@dataclass
class Job:
    """A run and its state. strengths: read at every stage of every step, and may be changed meanwhile."""

    order: Order
    columns: list[Column]
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
    def current(self) -> Column | None:
        """The column that is being filled."""
        return None if self.state != "running" else next((column for column in self.columns if not column.done), None)

    @property
    def mark(self) -> tuple[Any, ...]:
        """Differs whenever the pictures do."""
        return (self.state, *((len(column.pictures), column.error, column.done) for column in self.columns))


def follow(work: Callable[[Job], None], job: Job) -> Iterator[None]:
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
