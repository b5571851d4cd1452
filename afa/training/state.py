"""The state of a run on disk: everything that the next step depends on, so that resuming changes no bit."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from afa.errors import UserError
from afa.files import replacing
from afa.training.settings import LoopSettings

FOLDER = ".training"  # inside the output folder, gone when training is complete
STATE = "state.pt"


def state_file(settings: LoopSettings) -> Path:
    return Path(settings.output) / FOLDER / STATE


def save_state(settings: LoopSettings, state: dict[str, Any]) -> None:
    """Replace the saved state; a crash in between leaves the old one."""
    file = state_file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        torch.save({"settings": json.dumps(settings.binding()), **state}, temporary)


def load_state(settings: LoopSettings, device: torch.device) -> dict[str, Any] | None:
    """The state to go on from, None if there is none. Raises UserError if it was begun with other options, naming them."""
    file = state_file(settings)
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        begun = json.loads(state.pop("settings"))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}); delete it to begin again") from None
    check_unchanged(settings, begun, f"the run in {settings.output}")
    return state


def move_state(settings: LoopSettings, place: Path) -> None:
    """Put the saved state somewhere else, for a longer run to go on from."""
    os.replace(state_file(settings), place)


def begin_from(settings: LoopSettings, place: Path) -> None:
    """Let a run that has not begun go on from a state that a shorter one left; nothing where there is none."""
    if place.exists():
        state_file(settings).parent.mkdir(parents=True, exist_ok=True)
        os.replace(place, state_file(settings))


def check_unchanged(settings: LoopSettings, begun: dict[str, Any], what: str) -> None:
    """Raises UserError, naming every option that differs from those a run was begun with."""
    asked = json.loads(json.dumps(settings.binding()))
    changed = [f"--{name.replace('_', '-')} {value} (now {asked[name]})" for name, value in begun.items() if asked.get(name) != value]
    if changed:
        raise UserError(f"{what} was begun with {', '.join(changed)}; use the same options, or another --output")
