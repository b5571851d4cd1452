"""The state of a run on disk: everything that the next step depends on, so that resuming changes no bit."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from afa.checkpoint.manifest import MANIFEST, read_manifest
from afa.errors import UserError
from afa.files import replacing, settled
from afa.fingerprint import FILES, check_same
from afa.schema import build
from afa.training.choices import STEPS_BEFORE, as_begun
from afa.training.settings import LoopSettings, TrainSettings

FOLDER = ".training"  # inside the output folder
STATE = "state.pt"  # while training is not complete
KEPT = "last.pt"  # the same of a complete run, from which more steps go on


def state_file(settings: LoopSettings) -> Path:
    return settings.folder / FOLDER / STATE


def kept_file(settings: LoopSettings) -> Path:
    return settings.folder / FOLDER / KEPT


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
    """Remove the state of a run that is complete, but for what was kept for more steps."""
    folder = settings.folder / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != KEPT:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


def save_state(settings: LoopSettings, begun: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the saved state; a crash in between leaves the old one.

    begun: what belongings() returned
    """
    file = state_file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        torch.save({"settings": json.dumps(begun), "steps": settings.steps, **state}, temporary)


def load_state(settings: LoopSettings, now: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return the state to resume from; None if there is none.

    now: what belongings() returns
    Raises UserError, which names the difference, if the run was started with other options or files.
    """
    if not state_file(settings).exists():
        return None
    state, begun = _read(state_file(settings), map_location=device)
    defaults = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    added = {name: defaults[name] for name in now if name in defaults}  # options that came later
    check_same(added | as_begun(begun), as_begun(now), f"the run in {settings.output}")
    return {name: value for name, value in state.items() if name != "steps"}


def begun_with(settings: TrainSettings) -> dict[str, Any] | None:
    """Return the options of the run in the folder, complete or not; None if there is none."""
    if state_file(settings).exists():
        state, begun = _read(state_file(settings), mmap=True)
        return as_begun({"steps": state.get("steps", STEPS_BEFORE), **begun})
    if not (settled(Path(settings.output)) / MANIFEST).exists():
        return None
    return as_begun((read_manifest(Path(settings.output)).training or {}).get("settings", {}))


def _read(file: Path, **how: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a state, and the options that the run was begun with. how: arguments of torch.load"""
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True, **how)
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
    return state, build(dict[str, Any], begun, file, "settings")


def go_on(settings: LoopSettings, log: str) -> None:
    """Let a complete run make more steps from the state that it kept, if there is one; see begin_from.

    log: the name of its log, which continues too
    """
    if kept_file(settings).exists() and not state_file(settings).exists():
        with suppress(FileNotFoundError):
            shutil.copyfile(settings.folder / log, state_file(settings).with_name(log))
        begin_from(settings, kept_file(settings))


def begin_from(settings: LoopSettings, place: Path) -> None:
    """Let a run that has not begun continue from a state that a shorter run left, if there is one."""
    if place.exists():
        state_file(settings).parent.mkdir(parents=True, exist_ok=True)
        os.replace(place, state_file(settings))
