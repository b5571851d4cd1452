"""A forecast of a comparison: the images that it would draw, and the time on this machine."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from afa.evaluation.axes import Axis
from afa.evaluation.choosing import Values, foretold, on_curves, points, to_score
from afa.evaluation.context import ComparisonContext, check_row, prepare
from afa.evaluation.images import MEMORY, MEMORY_STEPS, image_folder
from afa.evaluation.methods import all_rows, study_rows
from afa.evaluation.results import image_name
from afa.evaluation.rows import SEARCH, Chosen, MethodRow, Options, apart
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.untrained import unsearched
from afa.pages.numbers import count, plural
from afa.places import as_typed
from afa.sampling.sample import Request

DRAWN = {  # purposes of whole images, and the same in words
    "judged": "to judge",
    "curves": "more for curves",
    "tuning": "to choose options",
    "search": "to search weights",
}
# What a step costs: that of one model, of all experts' predictions, or of the ensemble. -> the row it is
# measured with.
MEASURED = {"ensemble": "afa", "all experts": "noise_average", "one model": "single"}


@dataclass(frozen=True)
class Work:
    """Images that are still to be drawn.

    what:  a key of DRAWN, or memory
    kind:  one of MEASURED
    steps: of each image
    """

    what: str
    kind: str
    images: int
    steps: int


def plan(settings: EvaluateSettings) -> dict[str, Any]:
    """Forecast a comparison, and find everything that would fail early. Leaves no files behind.

    Images: those missing, or the most that may be until values are chosen. Raises UserError.
    """
    comparison = prepare(settings, keep=False)
    setup, tuner = comparison.setup, comparison.tuner
    rows = all_rows(setup, tuner, comparison.names)
    rows = [row for row in [*rows, *study_rows(setup)] if check_row(comparison, row)]
    work = _work(comparison, rows)
    protocol = setup.protocol.facts() | {axis.name: _axis_words(axis) for axis in setup.axes}
    references = setup.protocol.references
    trained = ", ".join(row.name for row in rows if row.train is not None and row.name != SEARCH)
    curves = ", ".join(one.row.title for one in _on_curves(comparison, rows)) or None
    if curves and settings.curves is None:
        curves += " (or, by the tuning captions, others of a kind)"
    facts = {
        "ensemble": f"{as_typed(str(setup.folder))}: {', '.join(setup.names)}",
        "protocol": ", ".join(f"{name} {value}" for name, value in protocol.items() if value is not None),
        "references": f"{len(references)} pictures are read" if references else None,
        "methods": ", ".join(comparison.names),
        "curves": curves,
        "left_out": "; ".join(comparison.errors) or None,
        "images": sum(_images(work, what) for what in DRAWN),
        "images_to_judge": _images(work, "judged"),
        "images_of_curves": _images(work, "curves") if setup.axes else None,
        "images_to_choose_options": _images(work, "tuning"),
        "images_to_search_weights": _images(work, "search"),
        "images_to_measure_memory": f"{_images(work, 'memory')} besides, of at most {MEMORY_STEPS} steps",
        "trained": f"{trained}; {plural(settings.seeds, 'seed')} each, the ensemble's first is there",
        "training_runs": sum(row.trainings for row in rows),
        "options_chosen_on": f"{len(tuner.captions)} captions that are not judged"
        if tuner.able
        else "nothing: defaults are taken",
        "scorer": settings.scorer,
        "metrics": ", ".join(comparison.judge.notes()),
        "device": str(setup.device),
        **_times(comparison, work, sum(row.trainings for row in rows)),
    }
    return {name: value for name, value in facts.items() if value is not None}


def announced(comparison: ComparisonContext, rows: Sequence[MethodRow]) -> str:
    """Return a line that says what a comparison will draw; empty if everything is there."""
    work = _work(comparison, [row for row in rows if not row.based or comparison.setup.settings.base])
    most = "at most " if comparison.setup.axes and comparison.tuner.able else ""  # own values are not known
    parts = [f"{count(_images(work, what))} {words}" for what, words in DRAWN.items() if _images(work, what)]
    how_long = "how long it takes: the same command with --dry-run"
    return f"afa: images to draw: {most}{', '.join(parts)}; {how_long}\n" if parts else ""


def _axis_words(axis: Axis) -> str:
    """Return the values of a setting, and how each method gets its own."""
    values = ", ".join(f"{value:.16g}" for value in axis.values)
    return f"{values} (each method its own; options are chosen at {axis.start:.16g})"


def _images(work: Sequence[Work], what: str) -> int:
    return sum(one.images for one in work if one.what == what)


def _work(comparison: ComparisonContext, rows: Sequence[MethodRow]) -> list[Work]:
    """Return everything that is still to be drawn."""
    others = points(comparison.setup, _on_curves(comparison, rows))
    chosen = [*_foretold(comparison, rows), *others]
    return [*_tuning(comparison, rows), *(part for one in chosen for part in _drawing(comparison, one))]


def _on_curves(comparison: ComparisonContext, rows: Sequence[MethodRow]) -> list[Chosen]:
    """Return the rows that will be on curves; of those that may be, one of which no image is there yet."""
    return on_curves(comparison.setup, _foretold(comparison, rows), unscored=math.inf)


def _foretold(comparison: ComparisonContext, rows: Sequence[MethodRow]) -> list[Chosen]:
    """Return what will be chosen for each row; without scores, the values that lack most images."""
    setup, tuner, found = comparison.setup, comparison.tuner, []
    for row in rows:
        chosen = foretold(setup, tuner, row)
        if tuner.able and chosen.score is None:
            for axis in setup.axes:
                each = [replace(chosen, at={**chosen.at, axis.name: value}) for value in axis.of(row)]
                chosen = max(each, key=lambda one: _images(_drawing(comparison, one), "judged"))
        found.append(chosen)
    return found


def _times(comparison: ComparisonContext, work: list[Work], runs: int) -> dict[str, Any]:
    """Return the seconds of all images and of some training runs, also in words.

    A batch of each kind is measured here; a training takes as long as the ensemble's training took.
    """
    recorded = (comparison.setup.manifest.training or {}).get("seconds", 0.0)
    seconds = _seconds(comparison, work)
    return {
        "seconds_to_draw": round(seconds, 1),
        "seconds_to_train": round(runs * recorded, 1),
        "time": f"about {_duration(seconds + runs * recorded)}: {_duration(seconds)} to draw, "
        f"by a batch of each kind measured here; {plural(runs, 'training')} of {_duration(recorded)}, "
        "as the ensemble records its own; metrics are not counted",
    }


def _tuning(comparison: ComparisonContext, rows: Sequence[MethodRow]) -> list[Work]:
    """Return the images of what is not scored yet: for ranking experts, and for each row."""
    tuner, setup = comparison.tuner, comparison.setup
    if not tuner.able:
        return []
    asked: list[tuple[str, str, Options, Values]] = [
        ("single", "one model", {"expert": name}, {}) for name in setup.names
    ]
    asked += [(row.method, row.cost, *one) for row in rows for one in to_score(setup, tuner, row)]
    work: dict[tuple[str, str], Work] = {}
    for name, kind, options, at in asked:
        there = tuner.tuner_at(at)
        if there.kept(name, options) is None:
            steps = replace(setup.sampling, **at).steps
            work[name, there.key(options)] = Work("tuning", kind, len(tuner.captions), steps)
    return list(work.values())


def _drawing(comparison: ComparisonContext, chosen: Chosen) -> list[Work]:
    """Return a row's missing images, including those that measure memory and search weights."""
    setup, tuner, row = comparison.setup, comparison.tuner, chosen.row
    sampling, kind = chosen.sampling(setup.sampling), row.cost
    found = []
    for run in range(row.runs):
        folder = image_folder(setup.output, row, run, apart(chosen.at, setup.sampling))
        names = map(image_name, range(len(setup.protocol.items)))
        missing = sum(not (folder / name).exists() for name in names)
        found.append(Work("curves" if chosen.axis else "judged", kind, missing, sampling.steps))
        unmeasured = not chosen.axis and not (folder / MEMORY).exists()
        found.append(Work("memory", kind, int(unmeasured), min(MEMORY_STEPS, sampling.steps)))
    if row.name == SEARCH and not chosen.axis:
        merges = unsearched(setup, tuner)
        found.append(Work("search", kind, merges * len(tuner.captions), setup.sampling.steps))
    return found


def _seconds(comparison: ComparisonContext, work: list[Work]) -> float:
    """Return the seconds to draw everything.

    A batch of each kind is drawn in one step and in three, after one to warm up. This tells the seconds of
    a step from those of the rest: the text encoders and the VAE.
    """
    setup, total = comparison.setup, 0.0
    batch = setup.protocol.items[: setup.settings.batch_size]
    requests = [Request(item.caption, item.seed) for item in batch]
    for kind, name in MEASURED.items():
        own = [one for one in work if one.kind == kind and one.images]
        if own:
            row, took = all_rows(setup, comparison.tuner, [name])[0], []
            sampler = row.sampler(row.candidates[0], 0)
            for steps in (1, 1, 3):
                began = time.perf_counter()
                sampler(requests, replace(setup.sampling, steps=steps))
                took.append((time.perf_counter() - began) / len(requests))
            step = max(0.0, took[2] - took[1]) / 2
            rest = max(0.0, took[1] - step)
            total += sum(one.images * (rest + one.steps * step) for one in own)
    return total


def _duration(seconds: float) -> str:
    """Return a duration in a fitting unit."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
