"""A forecast of a comparison: the images that it would draw, and the time on this machine."""

import time
from dataclasses import dataclass, replace
from typing import Any

from afa.evaluation.images import MEMORY, MEMORY_STEPS, image_folder
from afa.evaluation.methods import all_rows, study_rows
from afa.evaluation.results import image_name
from afa.evaluation.rows import SEARCH, MethodRow
from afa.evaluation.run import ComparisonContext, check_row, prepare
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.untrained import unsearched
from afa.pages.numbers import plural
from afa.sampling.sample import Request

# What a step costs: that of one model, of all experts' predictions, or of the ensemble. -> the row it is
# measured with.
MEASURED = {"ensemble": "afa", "all experts": "noise_average", "one model": "single"}


@dataclass(frozen=True)
class Work:
    """Images that are still to be drawn.

    what:  their purpose
    kind:  one of MEASURED
    steps: of each image
    """

    what: str
    kind: str
    images: int
    steps: int


def plan(settings: EvaluateSettings) -> dict[str, Any]:
    """Forecast a comparison, and find everything that would fail early. Leaves no files behind.

    Images: those that are missing. Seconds: see _times. Raises UserError.
    """
    comparison = prepare(settings, keep=False)
    setup, tuner = comparison.setup, comparison.tuner
    rows = all_rows(setup, tuner, comparison.names)
    rows = [row for row in [*rows, *study_rows(setup, rows)] if check_row(comparison, row)]
    work = [*_tuning(comparison, rows), *(one for row in rows for one in _drawing(comparison, row))]
    kinds = ("judged", "tuning", "search", "memory")
    images = {what: sum(one.images for one in work if one.what == what) for what in kinds}
    protocol = (f"{name} {value}" for name, value in setup.protocol.facts().items() if value is not None)
    references = setup.protocol.references
    trained = ", ".join(row.name for row in rows if row.train is not None and row.name != SEARCH)
    facts = {
        "ensemble": f"{setup.folder}: {', '.join(setup.names)}",
        "protocol": ", ".join(protocol),
        "references": f"{len(references)} pictures are read" if references else None,
        "methods": ", ".join(comparison.names),
        "left_out": "; ".join(comparison.errors) or None,
        "images": images["judged"] + images["tuning"] + images["search"],
        "images_to_judge": images["judged"],
        "images_to_choose_options": images["tuning"],
        "images_to_search_weights": images["search"],
        "images_to_measure_memory": f"{images['memory']} besides, of at most {MEMORY_STEPS} steps",
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


def _times(comparison: ComparisonContext, work: list[Work], runs: int) -> dict[str, Any]:
    """Return the seconds of all images and of some training runs, also in words.

    One image of each kind is measured here; a training takes as long as the ensemble's training took.
    """
    recorded = (comparison.setup.manifest.training or {}).get("seconds", 0.0)
    seconds = _seconds(comparison, work)
    return {
        "seconds_to_draw": round(seconds, 1),
        "seconds_to_train": round(runs * recorded, 1),
        "time": f"about {_duration(seconds + runs * recorded)}: {_duration(seconds)} to draw, "
        f"by an image of each kind measured here; {plural(runs, 'training')} of {_duration(recorded)}, "
        "as the ensemble records its own; metrics are not counted",
    }


def _tuning(comparison: ComparisonContext, rows: list[MethodRow]) -> list[Work]:
    """Return the images of candidates that are not scored yet: for ranking experts, and for each row."""
    tuner, setup = comparison.tuner, comparison.setup
    if not tuner.able:
        return []
    asked = {("single", "one model"): [{"expert": name} for name in setup.names]}
    for row in rows:
        if len(row.candidates) > 1 and not row.by_loss:
            asked[row.of or row.name, row.cost] = list(row.candidates)
    steps = setup.sampling.steps
    return [
        Work("tuning", kind, tuner.unscored(name, candidates) * len(tuner.captions), steps)
        for (name, kind), candidates in asked.items()
    ]


def _drawing(comparison: ComparisonContext, row: MethodRow) -> list[Work]:
    """Return a row's missing images, including those that measure memory and search weights."""
    setup, tuner = comparison.setup, comparison.tuner
    steps, kind = (row.sampling or setup.sampling).steps, row.cost
    found = []
    for run in range(row.runs):
        folder = image_folder(setup.output, row, run)
        names = map(image_name, range(len(setup.protocol.items)))
        missing = sum(not (folder / name).exists() for name in names)
        found.append(Work("judged", kind, missing, steps))
        found.append(Work("memory", kind, int(not (folder / MEMORY).exists()), min(MEMORY_STEPS, steps)))
    if row.name == SEARCH:
        merges = unsearched(setup, tuner)
        found.append(Work("search", kind, merges * len(tuner.captions), setup.sampling.steps))
    return found


def _seconds(comparison: ComparisonContext, work: list[Work]) -> float:
    """Return the seconds to draw everything, one image at a time.

    One image of each kind is drawn in one step and in three, after one to warm up. This tells the seconds of
    a step from those of the rest: the text encoders and the VAE.
    """
    setup, total = comparison.setup, 0.0
    item = setup.protocol.items[0]
    for kind, name in MEASURED.items():
        own = [one for one in work if one.kind == kind and one.images]
        if own:
            row, took = all_rows(setup, comparison.tuner, [name])[0], []
            sampler = row.sampler(row.candidates[0], 0)
            for steps in (1, 1, 3):
                began = time.perf_counter()
                sampler([Request(item.caption, item.seed)], replace(setup.sampling, steps=steps))
                took.append(time.perf_counter() - began)
            step = max(0.0, took[2] - took[1]) / 2
            rest = max(0.0, took[1] - step)
            total += sum(one.images * (rest + one.steps * step) for one in own)
    return total


def _duration(seconds: float) -> str:
    """Return a duration in a fitting unit."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
