"""One run for each visitor (a browser tab or an API client), and requests from the metadata of pictures."""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from afa.errors import UserError
from afa.prompt_syntax import PLAIN
from afa.webui.engine import Engine, PageMethod
from afa.webui.queue import DrawingJob, MethodColumn
from afa.webui.request_validation import make_strengths

REMEMBERED = 200  # visitors whose last run is kept


class Sessions:
    """The last run of each visitor; a visitor is the session hash of Gradio."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs: OrderedDict[str, DrawingJob] = OrderedDict()

    def job(self, visitor: str | None) -> DrawingJob | None:
        """Return the visitor's last run, None if there is none."""
        return self._jobs.get(visitor or "")

    def begin(self, visitor: str | None, given: Mapping[str, Any]) -> DrawingJob:
        """Create a new run and cancel the visitor's previous one. Raises UserError for an invalid request."""
        return self._take(visitor, self.engine.job(given))

    def again(self, visitor: str | None, strengths: Mapping[str, Any]) -> DrawingJob | None:
        """Create the visitor's last run again with other strengths.

        Pictures of methods without strengths are found in the gallery. Returns None if the last run has not
        ended, had the same strengths, or has no method with strengths.
        """
        last, wanted = self.job(visitor), make_strengths(strengths, self.engine.ensemble.names)
        if last is None or not last.over or last.strengths == wanted:
            return None
        if not any(self.engine.methods[name].scalable for name in last.request.methods):
            return None
        columns = [MethodColumn(column.method, column.title) for column in last.columns]
        request = dataclasses.replace(last.request, strengths=wanted)
        return self._take(visitor, DrawingJob(request, columns, wanted, last.loras))

    def strengthen(self, visitor: str | None, strengths: Mapping[str, Any]) -> None:
        """Change the strengths of the current run from its next stage on. Raises UserError if invalid."""
        wanted, last = make_strengths(strengths, self.engine.ensemble.names), self.job(visitor)
        if last is not None and not last.over:
            last.strengths.update(wanted)

    def cancel(self, visitor: str | None) -> DrawingJob:
        """Cancel the visitor's run. Raises UserError if there is none."""
        last = self.job(visitor)
        if last is None or last.over:
            raise UserError("there is no run of yours to cancel")
        last.cancel()
        return last

    def close(self) -> None:
        """Cancel all runs and wait for them, since a process that ends while its device is busy may crash."""
        for job in self._jobs.values():
            job.cancel()
        self.engine.queue.empty(seconds=60)

    def _take(self, visitor: str | None, job: DrawingJob) -> DrawingJob:
        before = self._jobs.pop(visitor or "", None)
        if before is not None:
            before.cancel()
        self._jobs[visitor or ""] = job
        while len(self._jobs) > REMEMBERED:
            self._jobs.popitem(last=False)[1].cancel()
        return job


TEXTS = ("prompt", "negative_prompt")
NUMBERS = ("seed", "steps", "guidance", "true_guidance", "width", "height")


def request_from_metadata(metadata: Mapping[str, Any], engine: Engine) -> tuple[dict[str, Any], list[str]]:
    """Convert the metadata of a picture to the fields of a request.

    Returns the fields, and remarks on settings that this page cannot reproduce.
    Raises UserError for invalid settings.
    """
    found: dict[str, Any] = {name: metadata.get(name) or "" for name in TEXTS} | {
        name: metadata.get(name) for name in NUMBERS
    }
    notes: list[str] = []
    found["methods"] = [_method(metadata, engine, notes)]
    found["scheduler"] = _scheduler(metadata.get("scheduler"), engine, notes)
    found["strengths"] = _strengths(metadata, engine, notes)
    found["regions"] = metadata.get("regions") or []
    found["method_options"] = _options(metadata, engine.methods[found["methods"][0]])
    found["images"] = 1
    found["prompt_syntax"] = metadata.get("prompt_syntax") or PLAIN
    _compare(metadata, engine, notes)
    try:
        engine.job({name: value for name, value in found.items() if value is not None})
    except UserError as error:
        raise UserError(f"the picture's settings cannot be used here: {error}") from None
    return found, notes


def _options(metadata: Mapping[str, Any], method: PageMethod) -> dict[str, Any]:
    """Return the options of the method that are given in the metadata and are not its defaults."""
    given = metadata.get("method_options")
    if method.options is None or not method.made(metadata) or not isinstance(given, Mapping):
        return {}
    usual = method.record["method_options"]
    changed = {
        name: value
        for name, value in given.items()
        if value is not None and value != usual.get(name, object())
    }
    return {method.name: changed} if changed else {}


def _method(metadata: Mapping[str, Any], engine: Engine, notes: list[str]) -> str:
    made = next((method.name for method in engine.methods.values() if method.made(metadata)), None)
    if made is not None:
        return made
    what = metadata.get("method") or metadata.get("expert") or "a trained ensemble"
    first = next(iter(engine.methods))
    notes.append(
        f"it was made by {str(what)[:60]} with options that are not offered here;"
        f" {engine.methods[first].title} is chosen instead"
    )
    return first


def _scheduler(name: Any, engine: Engine, notes: list[str]) -> str:
    """Return a scheduler's name, or "" for the experts' own, which pictures name by its class."""
    if name in engine.schedulers:
        return str(name)
    if name not in (None, type(engine.ensemble.frame.scheduler).__name__, "SuperposedScheduler"):
        notes.append(
            f"it was made with scheduler {str(name)[:60]}, which is not here; the experts' own is used"
        )
    return ""


def _strengths(metadata: Mapping[str, Any], engine: Engine, notes: list[str]) -> dict[str, Any]:
    if metadata.get("strength_changes"):
        notes.append(
            "its strengths were changed while it was made, so the result will differ; the first ones are used"
        )
    given = metadata.get("strengths")
    return {
        name: given.get(name, 1.0) if isinstance(given, Mapping) else 1.0 for name in engine.ensemble.names
    }


def _compare(metadata: Mapping[str, Any], engine: Engine, notes: list[str]) -> None:
    """Note whether the experts or the aggregators differ."""
    experts = metadata.get("experts")
    if experts is not None and experts != list(engine.ensemble.names):
        notes.append(
            f"its experts were {str(experts)[:80]}, here they are {', '.join(engine.ensemble.names)}"
        )
    elif metadata.get("aggregators") not in (None, engine.aggregators):
        notes.append("it was made with other aggregators than are loaded here")
