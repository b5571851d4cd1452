"""Run a comparison: all methods draw from the same noise, and all metrics judge all images."""

import functools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState

from afa.devices import free_memory
from afa.errors import UserError
from afa.evaluation.images import ImageSet, image_folder, make_images, measured_memory
from afa.evaluation.judge import Judge
from afa.evaluation.methods import all_rows, study_rows
from afa.evaluation.names import chosen_methods, known_methods
from afa.evaluation.results import Method, Results, Run, machine, versions
from afa.evaluation.rows import MethodRow, Options, Trained
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.setup import Setup
from afa.evaluation.tuning import ScoringError, Tuner
from afa.files import locked, sha256
from afa.fingerprint import check_claim, claim, digest, fingerprint, saved_fingerprint
from afa.metrics.user import try_scorer
from afa.places import public_place
from afa.training.record import LEFT_OUT

T = TypeVar("T")


@dataclass(frozen=True)
class ComparisonContext:
    """The parts that a comparison works with."""

    setup: Setup
    judge: Judge
    tuner: Tuner
    names: tuple[str, ...]
    errors: list[str]

    def attempt(self, what: str, asked_for: bool, work: Callable[[], T]) -> T | None:
        """Do some work; if it fails, note the error and return None.

        asked_for: the user named it, so its failure raises UserError instead
        """
        try:
            return work()
        except (UserError, ValueError, NotImplementedError) as error:
            if asked_for:
                raise UserError(f"{what}: {error}") from error
            if error.__cause__ is not None:  # of a user's file: where it happened
                self._log(what)
            self.note(f"{what}: {error}")
        except Exception as error:
            self._log(what)
            self.note(f"{what}: {type(error).__name__}: {error} (see errors.log)")
        return None

    def _log(self, what: str) -> None:
        """Append the current traceback to errors.log."""
        with (self.setup.output / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{what}\n{traceback.format_exc()}\n")

    def note(self, sentence: str) -> None:
        """Note what could not be done, for the report, and print it."""
        self.errors.append(sentence)
        if PartialState().is_main_process:
            print(f"afa: left out: {sentence}", file=sys.stderr)


def prepare(settings: EvaluateSettings, keep: bool = True) -> ComparisonContext:
    """Find everything that would fail later: names, protocol data, weights of metrics, places of experts.

    keep: write the settings into the output folder
    Raises UserError.
    """
    names = chosen_methods(settings.methods)
    setup = Setup(settings)
    judge = Judge.make(settings, setup.protocol, setup.output / "judged", setup.device)
    asked = {**settings.binding(), "the ensemble's afa.json": sha256(setup.folder / "afa.json")}
    files = saved_fingerprint(setup.folder, setup.moved) | fingerprint(base=settings.base)
    check_claim(setup.output, asked, "the comparison", files)
    PartialState().wait_for_everyone()  # all processes check it before the first one writes
    if keep and PartialState().is_main_process:
        claim(setup.output, asked, "the comparison", files)
    if settings.scorer is not None:
        try_scorer(judge.metrics, *setup.size())
    captions = setup.tuning_captions() if settings.tuning else []
    identity = digest({"judge": judge.tuning_identity, "captions": json.dumps(captions)})
    tuner = Tuner(
        setup.output / "tuning" / identity[:16],
        captions,
        setup.sampling,
        judge.tuning_score,
        settings.batch_size,
    )
    comparison = ComparisonContext(setup, judge, tuner, names, [])
    left_out = setup.protocol.left_out
    if left_out:
        comparison.note(
            f"pictures of --protocol {settings.protocol}, with their prompts: {left_out.summary()}"
        )
        if keep and PartialState().is_main_process:
            left_out.write(setup.output / LEFT_OUT)
    return comparison


def evaluate(settings: EvaluateSettings) -> Results | None:
    """Compare methods: draw, train and score what is missing in settings.output. It resumes image by image.

    settings: the options of `afa evaluate`
    Returns the results; None in all processes but the first. A metric or method that fails is left out, and
    noted in results.errors. Raises UserError for what cannot be compared at all.
    """
    with locked(Path(settings.output)):
        comparison = prepare(settings)
        rows, drawn = _rows(comparison), []
        for place, row in enumerate(rows, 1):
            work = functools.partial(_draw, comparison, row, f"{place}/{len(rows)} ")
            done = comparison.attempt(row.title, asked_for(settings, row), work)
            drawn += [done] if done is not None else []
            free_memory()  # of this row's models
        if not PartialState().is_main_process:
            return None
        results = _results(comparison, [_judge(comparison, one) for one in drawn])
        results.save(comparison.setup.output)
        return results


def asked_for(settings: EvaluateSettings, row: MethodRow) -> bool:
    """Return whether the user named this row, so that its failure must raise."""
    return "all" not in settings.methods and row.name.partition(":")[0] in settings.methods


def check_row(comparison: ComparisonContext, row: MethodRow) -> bool:
    """Return whether a row has its base model and its training settings, before anything is drawn.

    Raises UserError if the user named the row; else a failure is noted.
    """
    setup = comparison.setup

    def check() -> bool:
        if row.based and setup.settings.base is None:
            _ = setup.base  # which says that it is missing
        if row.guided:
            setup.check_guided()
        if row.trainings:
            setup.training(setup.output, 0)
        return True

    return comparison.attempt(row.title, asked_for(setup.settings, row), check) or False


def _rows(comparison: ComparisonContext) -> list[MethodRow]:
    """Return the rows; experts are ranked before baselines are made of them."""
    setup = comparison.setup
    for row in all_rows(setup, comparison.tuner, comparison.names):
        if asked_for(setup.settings, row):
            check_row(comparison, row)
    comparison.attempt("ranking the experts", False, lambda: _rank(comparison))
    rows = all_rows(setup, comparison.tuner, comparison.names)
    return rows + study_rows(setup, rows)


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
    """One run's images, what was trained for it, and the megabytes that an image takes."""

    images: ImageSet
    trained: Trained | None
    memory_mb: float


@dataclass(frozen=True)
class DrawnRow:
    """A row with its chosen options and its runs."""

    row: MethodRow
    options: Options
    runs: list[DrawnRun]


def _draw(comparison: ComparisonContext, row: MethodRow, place: str) -> DrawnRow:
    """Choose options, train and draw: everything of a row that takes time.

    place: of the row among all rows, shown with the progress
    """
    setup, options, runs = comparison.setup, _choose(comparison, row), []
    for run in range(row.runs):
        trained = row.train(options, run) if row.train is not None else None
        identity = {
            "method": row.name,
            "options": options,
            "experts": {entry.name: sorted(entry.files.values()) for entry in setup.manifest.experts},
            "weights": sha256(trained.file) if trained is not None else None,
            "scheduler": setup.protocol.scheduler,
            "dtype": setup.settings.dtype,
        }
        folder, sampling = image_folder(setup.output, row, run), row.sampling or setup.sampling
        images = ImageSet(folder, setup.protocol.items, sampling, identity)
        make = functools.cache(functools.partial(row.sampler, options, run))  # once, if an image is missing
        title = f"{place}{row.title}{f', seed {run}' if row.runs > 1 else ''}"
        make_images(images, make, setup.settings.batch_size, title)
        runs.append(DrawnRun(images, trained, measured_memory(images, make)))
    return DrawnRow(row, options, runs)


def _choose(comparison: ComparisonContext, row: MethodRow) -> Options:
    if row.by_loss and row.train is not None:
        losses = [row.train(options, 0).loss for options in row.candidates]
        return row.candidates[int(np.argmin(losses))]
    try:
        return comparison.tuner.best(
            row.of or row.name, row.candidates, lambda options: row.sampler(options, 0)
        )
    except ScoringError as error:
        comparison.note(f"the choice of options of {row.title}: {error}; its defaults are taken")
        return row.candidates[0]


def _judge(comparison: ComparisonContext, drawn: DrawnRow) -> Method:
    """Score a row's images and return the row of the results."""
    setup, row, tuner = comparison.setup, drawn.row, comparison.tuner
    runs = []
    for run, one in enumerate(drawn.runs):
        scores, sets = comparison.judge.judge(one.images, setup.protocol, row.title, comparison.attempt)
        folder = str(one.images.folder.relative_to(setup.output))
        runs.append(Run(run, folder, scores, sets, one.images.seconds(), one.memory_mb))
    trained = [one.trained for one in drawn.runs if one.trained is not None]
    found = [one.note for one in trained if one.note]
    notes = [*([row.note] if row.note else []), *([" | ".join(found)] if found else [])]  # seed by seed
    if len(row.candidates) > 1:
        how = "its default, since there is nothing to choose by"
        if row.by_loss:
            how = "chosen by held-out loss of the first run"
        elif tuner.able:
            how = f"chosen by {len(tuner.captions)} other images"
        notes.append(f"{how}: {', '.join(f'{name} {value}' for name, value in drawn.options.items())}")
    return Method(
        row.name,
        row.group,
        row.title,
        runs,
        dict(row.axes),
        row.of,
        trained_parameters=trained[0].parameters if trained else 0,
        training_steps=trained[0].steps if trained else 0,
        training_seconds=[one.seconds for one in trained],
        note="; ".join(notes),
    )


def _results(comparison: ComparisonContext, methods: list[Method]) -> Results:
    setup = comparison.setup
    if "best_of_n" in comparison.names:
        methods = [*methods, *best_of_n(methods, comparison.judge.primary)]
    experts: list[dict[str, Any]] = [
        {"name": entry.name, "source": public_place(entry.source), "files": entry.files}
        for entry in setup.manifest.experts
    ]
    return Results(
        setup.protocol.facts() | {"training_seeds": setup.settings.seeds, "ranking": list(setup.ranking)},
        setup.protocol.items,
        comparison.judge.notes(),
        methods,
        comparison.errors,
        experts,
        versions(),
        machine(setup.device),
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
