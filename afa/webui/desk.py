"""Who asked for what: one run for each visitor, found again by the session of the browser tab or client."""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from afa.errors import UserError
from afa.webui.job import Column, Job
from afa.webui.order import make_strengths
from afa.webui.studio import Studio

REMEMBERED = 200  # visitors


class Desk:
    """Takes orders and keeps the last run of everybody."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def job(self, visitor: str | None) -> Job | None:
        """The visitor's last run."""
        return self._jobs.get(visitor or "")

    def begin(self, visitor: str | None, given: Mapping[str, Any]) -> Job:
        """A new run; one of theirs that goes on is stopped. Raises UserError for what may not be asked for."""
        return self._take(visitor, self.studio.job(given))

    def again(self, visitor: str | None, strengths: Mapping[str, Any]) -> Job | None:
        """The last run with other strengths, if it is over and made with others; its other pictures are there already."""
        last, wanted = self.job(visitor), make_strengths(strengths, self.studio.ensemble.names)
        if last is None or not last.over or last.strengths == wanted:
            return None
        if not any(self.studio.methods[name].scalable for name in last.order.methods):
            return None
        columns = [Column(column.method, column.title) for column in last.columns]
        return self._take(visitor, Job(dataclasses.replace(last.order, strengths=wanted), columns, wanted))

    def strengthen(self, visitor: str | None, strengths: Mapping[str, Any]) -> None:
        """Change the strengths of the run that goes on, from its next stage on. Raises UserError for strengths that cannot be."""
        wanted, last = make_strengths(strengths, self.studio.ensemble.names), self.job(visitor)
        if last is not None and not last.over:
            last.strengths.update(wanted)

    def cancel(self, visitor: str | None) -> Job:
        """Stop the visitor's run. Raises UserError if there is none."""
        last = self.job(visitor)
        if last is None or last.over:
            raise UserError("there is no run of yours to cancel")
        last.cancel()
        return last

    def close(self) -> None:
        """Stop everything, and wait for it: a device that is in use while the program ends makes it end badly."""
        for job in self._jobs.values():
            job.cancel()
        self.studio.turns.empty(seconds=60)

    def _take(self, visitor: str | None, job: Job) -> Job:
        before = self._jobs.pop(visitor or "", None)
        if before is not None:
            before.cancel()
        self._jobs[visitor or ""] = job
        while len(self._jobs) > REMEMBERED:
            self._jobs.popitem(last=False)[1].cancel()
        return job
