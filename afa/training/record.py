"""What a finished run leaves behind: its record, which is read instead of training again."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import numpy as np
import torch

from afa.checkpoint.manifest import Losses
from afa.errors import UserError
from afa.files import settled
from afa.fingerprint import FILES
from afa.schema import Count, Within, build
from afa.stats import estimate
from afa.text_files import read_json
from afa.training.loop import Progress, Trainer
from afa.training.settings import LoopSettings
from afa.training.state import check_finished, forget_state, kept_file, state_file
from afa.version import __version__

S = TypeVar("S", bound=LoopSettings)
LEFT_OUT = "left-out.jsonl"  # the images that could not be used, and why


def run_record(trainer: Trainer, progress: Progress, losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what all runs record: settings, versions, course and held-out losses.

    losses: of each held-out image, (n,), by what was measured
    """
    return {
        "settings": asdict(trainer.settings),
        "files": trainer.begun[FILES],
        "afa": __version__,
        "torch": torch.__version__,
        "training_images": len(trainer.data),
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.seconds, 1),
        "held_out_loss": {name: asdict(estimate(values)) for name, values in losses.items()},
        "history": progress.history,
    }


class RunRecord(TypedDict):
    """The fields of a finished run's record that are read again."""

    settings: dict[str, Any]
    parameters: Count
    steps: Count
    seconds: Annotated[float, Within(0)]
    held_out_loss: Losses


def finished_record(settings: S, name: str) -> tuple[dict[str, Any], S] | None:
    """Return the record of a complete run and the settings it was begun with; None if there is none.

    name: of the record's file in the run's folder
    Raises UserError for a file that is no such record.
    """
    file = settled(settings.folder) / name
    if not file.exists() or state_file(settings).exists():
        return None
    try:
        record: dict[str, Any] = build(RunRecord, read_json(file, nan=True), file)
        begun: S = build(type(settings), record["settings"], file, "settings")
    except UserError as error:
        raise UserError(f"{error}; choose another --output") from None
    return record, begun


def check_there(settings: Any, name: str, again: str) -> None:
    """Raise UserError if the single file of a complete run is gone.

    settings: with single_file, output and folder; name: of its record; again: what to do, for the message
    """
    if settings.single_file and not Path(settings.output).is_file():
        raise UserError(
            f"{settings.folder / name} says that {settings.output} is finished, and it is gone; "
            f"delete {settings.folder} to {again} again"
        )


def check_more_steps(
    settings: LoopSettings, begun: LoopSettings, record: Mapping[str, Any], what: str, further: str
) -> None:
    """Raise UserError unless a finished run can make more steps from the state that it kept.

    begun:   the recorded settings, of fewer steps
    further: what the user can do if it cannot, before "another --output"
    """
    finished = f"{what} was finished with --steps {begun.steps} (now {settings.steps})"
    if begun.schedule != "constant":
        raise UserError(
            f"{finished}, and --schedule {begun.schedule} has taken its rate to 0; {further} another --output"
        )
    if not kept_file(settings).exists():
        raise UserError(
            f"{finished}, and its last state {kept_file(settings)} is not there; {further} another --output"
        )
    check_finished(settings, begun, record.get("files"), what)
    since = record["steps"] - record["best_step"]
    if since >= settings.patience * settings.evaluate_every:
        raise UserError(
            f"{finished}, but its held-out loss has not fallen since step {record['best_step']} of "
            f"{record['steps']}; raise --patience (now {settings.patience}), or {further} another --output"
        )


def check_record(settings: LoopSettings, begun: LoopSettings, record: Mapping[str, Any], what: str) -> None:
    """Raise UserError unless the record of a finished run is that of these settings.

    begun: the recorded settings
    """
    if settings.steps != begun.steps:
        raise UserError(
            f"{what} was finished with --steps {begun.steps} (now {settings.steps}); choose another --output"
        )
    check_finished(settings, begun, record.get("files"), what)
    forget_state(settings)  # where a run was killed while it removed it
