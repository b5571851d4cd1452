"""From what a picture says of itself back to what was asked for."""

from collections.abc import Mapping
from typing import Any

from afa.errors import UserError
from afa.webui.studio import Studio

TEXTS = ("prompt", "negative_prompt")
NUMBERS = ("seed", "steps", "guidance", "true_guidance", "width", "height")


def read_order(metadata: Mapping[str, Any], studio: Studio) -> tuple[dict[str, Any], list[str]]:
    """What to ask for, as a run takes it, and what of the picture cannot be asked for here. Raises UserError for impossible settings."""
    found: dict[str, Any] = {name: metadata.get(name) or "" for name in TEXTS} | {name: metadata.get(name) for name in NUMBERS}
    notes: list[str] = []
    found["methods"] = [_method(metadata, studio, notes)]
    found["scheduler"] = _scheduler(metadata.get("scheduler"), studio, notes)
    found["strengths"] = _strengths(metadata, studio, notes)
    found["images"] = 1
    _compare(metadata, studio, notes)
    try:
        studio.job({name: value for name, value in found.items() if value is not None})
    except UserError as error:
        raise UserError(f"the picture's settings cannot be used here: {error}") from None
    return found, notes


def _method(metadata: Mapping[str, Any], studio: Studio, notes: list[str]) -> str:
    made = next((method.name for method in studio.methods.values() if method.made(metadata)), None)
    if made is not None:
        return made
    what = metadata.get("method") or metadata.get("expert") or "a trained ensemble"
    first = next(iter(studio.methods))
    notes.append(f"it was made by {str(what)[:60]} with options that are not offered here; {studio.methods[first].title} is chosen instead")
    return first


def _scheduler(name: Any, studio: Studio, notes: list[str]) -> str:
    """A name of ours, or "" for the experts' own, which pictures name by its class."""
    if name in studio.schedulers:
        return str(name)
    if name not in (None, type(studio.ensemble.frame.scheduler).__name__, "SuperposedScheduler"):
        notes.append(f"it was made with scheduler {str(name)[:60]}, and the experts' own is another")
    return ""


def _strengths(metadata: Mapping[str, Any], studio: Studio, notes: list[str]) -> dict[str, Any]:
    if metadata.get("strength_changes"):
        notes.append("strengths were changed while it was made, so it will not come out the same; those it began with are set")
    given = metadata.get("strengths")
    return {name: given.get(name, 1.0) if isinstance(given, Mapping) else 1.0 for name in studio.ensemble.names}


def _compare(metadata: Mapping[str, Any], studio: Studio, notes: list[str]) -> None:
    """Whether the same experts and aggregators are here."""
    experts = metadata.get("experts")
    if experts is not None and experts != list(studio.ensemble.names):
        notes.append(f"its experts were {str(experts)[:80]}, here they are {', '.join(studio.ensemble.names)}")
    elif metadata.get("aggregators") not in (None, studio.aggregators):
        notes.append("it was made with other aggregators than are loaded here")
