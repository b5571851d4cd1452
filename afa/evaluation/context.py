"""What a comparison works with: prepared and checked before anything is drawn."""

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from accelerate import PartialState

from afa.errors import UserError, unknown
from afa.evaluation.judge import Judge
from afa.evaluation.names import chosen_methods
from afa.evaluation.rows import MethodRow
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.setup import Setup
from afa.evaluation.tuning import Tuner
from afa.files import sha256
from afa.fingerprint import check_claim, claim, digest, fingerprint, saved_fingerprint
from afa.metrics.user import try_scorer
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
    for name in settings.curves or ():
        if name not in ("all", *names):
            raise UserError(f"--curves: {unknown(name, names, 'compared method')}")
    setup = Setup(settings)
    judge = Judge.make(settings, setup.protocol, setup.output / "judged", setup.device)
    begun = {axis.name: axis.begun for axis in setup.axes}
    asked = {**settings.binding(), **begun, "the ensemble's afa.json": sha256(setup.folder / "afa.json")}
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
