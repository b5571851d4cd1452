"""The state of a run on disk: everything that the next step depends on, so that resuming changes no bit."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from afa.errors import UserError
from afa.files import replacing
from afa.fingerprint import FILES, check_same
from afa.schema import build
from afa.training.settings import LoopSettings

FOLDER = ".training"  # inside the output folder, gone when training is complete
STATE = "state.pt"


def state_file(settings: LoopSettings) -> Path:
    return Path(settings.output) / FOLDER / STATE


def belongings(settings: LoopSettings, from_files: bool) -> dict[str, Any]:
    """Return what must be the same when a run resumes: options, and hashes of files.

    from_files: whether the models were loaded from files (not passed in memory)
    """
    found: dict[str, Any] = json.loads(json.dumps(settings.binding()))
    return {**found, FILES: settings.files() if from_files else {}}


def check_finished(
    settings: LoopSettings, begun: LoopSettings, files: dict[str, str] | None, what: str
) -> None:
    """Raise UserError if a complete run was started with other options or files.

    files: as its record has them; None in older records
    """
    now: dict[str, Any] = json.loads(json.dumps(settings.binding()))
    then: dict[str, Any] = json.loads(json.dumps(begun.binding()))
    if files:
        with suppress(UserError):  # what is gone by now cannot have changed what is complete
            now, then = {**now, FILES: settings.files()}, {**then, FILES: files}
    check_same(then, now, what)


def forget_state(settings: LoopSettings) -> None:
    """Remove the state of a run that is complete."""
    shutil.rmtree(Path(settings.output) / FOLDER, ignore_errors=True)


def save_state(settings: LoopSettings, begun: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the saved state; a crash in between leaves the old one.

    begun: what belongings() returned
    """
    file = state_file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        torch.save({"settings": json.dumps(begun), **state}, temporary)


def load_state(settings: LoopSettings, now: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return the state to resume from; None if there is none.

    now: what belongings() returns
    Raises UserError, which names the difference, if the run was started with other options or files.
    """
    file = state_file(settings)
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        begun = json.loads(state.pop("settings"))
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        UnpicklingError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read ({reason}); delete it to begin again") from None
    check_same(build(dict[str, Any], begun, file, "settings"), now, f"the run in {settings.output}")
    return state


def begin_from(settings: LoopSettings, place: Path) -> None:
    """Let a run that has not begun continue from a state that a shorter run left, if there is one."""
    if place.exists():
        state_file(settings).parent.mkdir(parents=True, exist_ok=True)
        os.replace(place, state_file(settings))
