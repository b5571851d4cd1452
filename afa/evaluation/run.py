"""Run a comparison: all methods draw from the same noise, and all metrics judge all images."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from afa.devices import free_memory
from afa.evaluation.choosing import choose, on_curves, points
from afa.evaluation.context import ComparisonContext, asked_for, check_row, prepare
from afa.evaluation.images import ImageSet, drawn_name, image_folder, make_images, measured_memory
from afa.evaluation.methods import all_rows, study_rows
from afa.evaluation.names import known_methods
from afa.evaluation.plan import announced
from afa.evaluation.results import Method, Results, Run, machine, versions
from afa.evaluation.rows import Chosen, MethodRow, Options, Trained, apart, in_words
from afa.evaluation.settings import EvaluateSettings
from afa.files import locked, sha256
from afa.places import public_place


def evaluate(settings: EvaluateSettings) -> Results | None:
    """Compare methods: draw, train and score what is missing in settings.output. It resumes image by image.

    settings: the options of `afa evaluate`
    Returns the results; None in all processes but the first. A metric or method that fails is left out, and
    noted in results.errors. Raises UserError for what cannot be compared at all.
    """
    with locked(Path(settings.output)):
        comparison = prepare(settings)
        drawn = _draw_all(comparison, _rows(comparison))
        curves = on_curves(comparison.setup, [one.chosen for one in drawn])
        drawn += _draw_all(comparison, points(comparison.setup, curves))
        if not PartialState().is_main_process:
            return None
        results = _results(comparison, drawn)
        results.save(comparison.setup.output)
        return results


def _rows(comparison: ComparisonContext) -> list[MethodRow]:
    """Return the rows; experts are ranked before baselines are made of them.

    Before that it is said what will be drawn.
    """
    setup = comparison.setup
    unranked = all_rows(setup, comparison.tuner, comparison.names)
    for row in unranked:
        if asked_for(setup.settings, row):
            check_row(comparison, row)
    if PartialState().is_main_process:
        print(announced(comparison, [*unranked, *study_rows(setup)]), end="", file=sys.stderr)
    comparison.attempt("ranking the experts", False, lambda: _rank(comparison))
    rows = all_rows(setup, comparison.tuner, comparison.names)
    return rows + study_rows(setup)


def _rank(comparison: ComparisonContext) -> None:
    """Rank the experts by their score on the tuning images, else by the held-out loss from training."""
    setup, tuner = comparison.setup, comparison.tuner
    if tuner.able:
        rows = {row.name.partition(":")[2]: row for row in all_rows(setup, tuner, ("single",))}
        candidates: list[Options] = [{"expert": name} for name in setup.names]
        reached = tuner.scores(
            "single", candidates, lambda options: rows[options["expert"]].sampler(options, 0)
        )
        order = np.argsort([-value for value in reached], kind="stable")
    else:
        losses = (setup.manifest.training or {}).get("held_out_loss", {})
        order = np.argsort([losses.get(name, {}).get("value", 0.0) for name in setup.names], kind="stable")
    setup.ranking = tuple(setup.names[index] for index in order)


@dataclass(frozen=True)
class DrawnRun:
    """One run's images, what was trained for it, and the megabytes that an image takes (not of points)."""

    images: ImageSet
    trained: Trained | None
    memory_mb: float | None


@dataclass(frozen=True)
class DrawnRow:
    """A row, or a point of its curve, with its runs."""

    chosen: Chosen
    runs: list[DrawnRun]


def _draw_all(comparison: ComparisonContext, several: Sequence[MethodRow | Chosen]) -> list[DrawnRow]:
    """Draw rows, for which something is to be chosen, or points of curves. What fails is left out."""
    drawn = []
    for place, one in enumerate(several, 1):
        row = one if isinstance(one, MethodRow) else one.row
        work = functools.partial(_draw, comparison, one, f"{place}/{len(several)} ")
        done = comparison.attempt(row.title, asked_for(comparison.setup.settings, row), work)
        drawn += [done] if done is not None else []
        free_memory()  # of this row's models
    return drawn


def _draw(comparison: ComparisonContext, one: MethodRow | Chosen, place: str) -> DrawnRow:
    """Choose what is to be chosen, train and draw: everything of a row that takes time.

    place: of the row among all rows, shown with the progress
    """
    setup = comparison.setup
    chosen = one if isinstance(one, Chosen) else choose(setup, comparison.tuner, one, comparison.note)
    row, options, other, runs = chosen.row, chosen.options, apart(chosen.at, setup.sampling), []
    for run in range(row.runs):
        trained = row.train(options, run) if row.train is not None else None
        identity = {
            "method": drawn_name(row, other),
            "options": options,
            "experts": {entry.name: sorted(entry.files.values()) for entry in setup.manifest.experts},
            "weights": sha256(trained.file) if trained is not None else None,
            "scheduler": setup.protocol.scheduler,
            "dtype": setup.settings.dtype,
        }
        folder = image_folder(setup.output, row, run, other)
        images = ImageSet(folder, setup.protocol.items, chosen.sampling(setup.sampling), identity)
        make = functools.cache(functools.partial(row.sampler, options, run))  # once, if an image is missing
        words = [f"{place}{row.title}", chosen.point, f"seed {run}" if row.runs > 1 else ""]
        make_images(images, make, setup.settings.batch_size, ", ".join(filter(None, words)))
        memory = None if chosen.axis else measured_memory(images, make)
        runs.append(DrawnRun(images, trained, memory))
    return DrawnRow(chosen, runs)


def _judge(comparison: ComparisonContext, drawn: DrawnRow) -> Method:
    """Score a row's images and return the row of the results."""
    setup, chosen, row = comparison.setup, drawn.chosen, drawn.chosen.row
    point, runs = chosen.point and f", {chosen.point}", []
    for run, one in enumerate(drawn.runs):
        title = f"{row.title}{point}"
        scores, sets = comparison.judge.judge(one.images, setup.protocol, title, comparison.attempt)
        folder = str(one.images.folder.relative_to(setup.output))
        runs.append(Run(run, folder, scores, sets, one.images.seconds(), one.memory_mb))
    trained = [one.trained for one in drawn.runs if one.trained is not None]
    return Method(
        f"{row.name}{point}",
        row.group,
        f"{row.title}{point}",
        runs,
        {chosen.axis: chosen.at[chosen.axis]} if chosen.axis else dict(row.axes),
        row.name if chosen.axis else row.of,
        trained_parameters=trained[0].parameters if trained else 0,
        training_steps=trained[0].steps if trained else 0,
        training_seconds=[one.seconds for one in trained],
        note="" if chosen.axis else "; ".join(_notes(comparison, chosen, trained)),
    )


def _notes(comparison: ComparisonContext, chosen: Chosen, trained: Sequence[Trained]) -> list[str]:
    """Return what was found for a row, seed by seed, what was chosen for it, and by what."""
    row, tuner = chosen.row, comparison.tuner
    notes = [note for note in (row.note, " | ".join(one.note for one in trained if one.note)) if note]
    by_images = f"chosen by {len(tuner.captions)} other images"
    if len(row.candidates) > 1:
        how = "its default, since there is nothing to choose by"
        if row.by_loss:
            how = "chosen by held-out loss of the first run"
        elif tuner.able:
            how = by_images
        notes.append(f"{how}: {', '.join(f'{name} {value}' for name, value in chosen.options.items())}")
    if chosen.at:
        how = "where options are chosen: there is nothing to choose by" if chosen.score is None else by_images
        notes.append(f"{' and '.join(in_words(*value) for value in chosen.at.items())}, {how}")
    return notes


def _results(comparison: ComparisonContext, drawn: Sequence[DrawnRow]) -> Results:
    setup, methods = comparison.setup, [_judge(comparison, one) for one in drawn]
    if "best_of_n" in comparison.names:
        methods = [*methods, *best_of_n(methods, comparison.judge.primary)]
    experts: list[dict[str, Any]] = [
        {"name": entry.name, "source": public_place(entry.source), "files": entry.files}
        for entry in setup.manifest.experts
    ]
    facts = setup.protocol.facts() | {axis.name: list(axis.values) for axis in setup.axes}
    if setup.axes:
        facts["options_chosen_at"] = " and ".join(in_words(axis.name, axis.start) for axis in setup.axes)
    return Results(
        facts | {"training_seeds": setup.settings.seeds, "ranking": list(setup.ranking)},
        setup.protocol.items,
        comparison.judge.notes(),
        methods,
        comparison.errors,
        experts,
        versions(),
        machine(setup.device),
        {one.chosen.row.name: dict(one.chosen.at) for one in drawn if one.chosen.at and not one.chosen.axis},
    )


def best_of_n(methods: list[Method], primary: str) -> list[Method]:
    """Take for each image the best expert's score: an upper bound that needs all images to be judged."""
    alone = [
        method.runs[0]
        for method in methods
        if method.name.startswith("single:") and not method.axes and primary in method.runs[0].scores
    ]
    if len(alone) < 2:
        return []
    best = np.argmax([run.scores[primary] for run in alone], axis=0)
    shared = set.intersection(*(set(run.scores) for run in alone))
    scores = {
        name: [alone[int(which)].scores[name][index] for index, which in enumerate(best)]
        for name in sorted(shared)
    }
    seconds = np.sum([run.seconds for run in alone], axis=0).tolist()
    note = known_methods()["best_of_n"]
    return [Method("best_of_n", "bound", "best of N (oracle)", [Run(0, "", scores, {}, seconds)], note=note)]
