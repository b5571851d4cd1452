"""One run at a time, in the order they came, and no more in line than may be."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from afa.errors import UserError
from afa.webui.job import Job

PATIENCE = 0.1  # seconds between looks at whether somebody in line has given up


class Turns:
    """A line before the device. waiting: runs that may stand in it besides the one that goes on."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._line: deque[Job] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """Inside, nobody else draws. Raises UserError if the line is full, Cancelled if the run is stopped while it waits."""
        with self._moved:
            if len(self._line) > self.waiting:
                many = "1 run is" if self.waiting == 1 else f"{self.waiting} runs are"
                raise UserError(f"{many} waiting already, as many as may (afa ui --queue); try again when one is done")
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

    def before(self, job: Job) -> int:
        """How many runs come before this one."""
        line = list(self._line)
        return next((place for place, other in enumerate(line) if other is job), 0)

    def empty(self, seconds: float) -> bool:
        """Wait until nobody is there: whether it came to that in time."""
        with self._moved:
            return self._moved.wait_for(lambda: not self._line, seconds)
