"""An output folder belongs to the settings it was begun with: noted in it, and held against those of whoever comes later."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.files import present, write_atomically

NOTE = "settings.json"


def check_claim(folder: Path, asked: Mapping[str, Any], what: str) -> None:
    """Raises UserError for a folder that was begun with other settings, or holds other files.

    A folder in which nothing has been made yet binds nobody: whoever mistyped an option may correct it.
    asked: by field; names with a space are no flags. what: what is made there, as in "the search".
    """
    if not folder.exists():
        return
    if folder.is_file():
        raise UserError(f"--output {folder} is a file; give a folder")
    there = {path.name for path in present(folder)}
    if there - {NOTE} and NOTE not in there:
        raise UserError(f"--output {folder} holds other files; choose another folder")
    if there - {NOTE}:
        begun, now = json.loads((folder / NOTE).read_text()), _plain(asked)
        changed = [f"{_told(name)} {value} (now {now.get(name)})" for name, value in begun.items() if now.get(name) != value]
        if changed:
            raise UserError(f"{what} in {folder} was begun with {', '.join(changed)}; use the same options, or another --output")


def claim(folder: Path, asked: Mapping[str, Any], what: str) -> None:
    """Note the settings in a folder that may be had; see check_claim."""
    check_claim(folder, asked, what)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NOTE, json.dumps(_plain(asked), indent=1))


def _plain(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(asked)))
    return plain


def _told(name: str) -> str:
    return name if " " in name else f"--{name.replace('_', '-')}"
