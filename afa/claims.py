"""An output folder belongs to the settings and files it was begun with: noted in it, and compared with those of later commands."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.files import json_or_none, present, refuse_busy, write_atomically
from afa.fingerprint import Files, changed
from afa.schema import build

NOTE = "settings.json"
FILES = "sha256 of files"  # the entry of the note that holds them


def check_claim(folder: Path, asked: Mapping[str, Any], what: str, files: Files | None = None) -> None:
    """Raises UserError for a folder that was begun with other settings or files, holds other things, or is being written to.

    A folder in which nothing has been made yet binds nobody: whoever mistyped an option may correct it.
    asked: by field; names with a space are no flags. what: what is made there, as in "the search". files: what it is made from.
    """
    if folder.is_file():
        raise UserError(f"--output {folder} is a file; give a folder")
    refuse_busy(folder)
    there = {path.name for path in present(folder)}
    if there - {NOTE} and NOTE not in there:
        raise UserError(f"--output {folder} holds other files; choose another folder")
    if there - {NOTE}:
        begun = _read(folder / NOTE)
        check_same(begun, {**_plain(asked), FILES: files or {}}, f"{what} in {folder}")


def claim(folder: Path, asked: Mapping[str, Any], what: str, files: Files | None = None) -> None:
    """Note settings and files in a folder that may be had; see check_claim. The folder should be locked."""
    check_claim(folder, asked, what, files)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / NOTE
    text = json.dumps({**_plain(asked), FILES: files or {}}, indent=1)
    if not note.exists() or note.read_text() != text:
        write_atomically(note, text)


def check_same(begun: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raises UserError, naming every option and file that differs. Both: fields, and under FILES hashes, if they were noted."""
    options = [f"{_told(name)} {value} (now {now.get(name)})" for name, value in begun.items() if name != FILES and now.get(name) != value]
    if options:
        raise UserError(f"{what} was begun with {', '.join(options)}; use the same options, or another --output")
    then = build(dict[str, str] | None, begun.get(FILES), what, FILES)
    files = changed(then, now.get(FILES) or {}) if then else []
    if files:
        more = f", and {len(files) - 3} more" if len(files) > 3 else ""
        raise UserError(f"{what} was begun with other files: {', '.join(files[:3])}{more}; restore them, or choose another --output")


def _read(note: Path) -> dict[str, Any]:
    found = json_or_none(note)
    if not isinstance(found, dict) or not isinstance(found.get(FILES, {}), dict):
        raise UserError(f"{note} is damaged, so it is not known what was begun in its folder; choose another --output")
    return found


def _plain(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(asked)))
    return plain


def _told(name: str) -> str:
    return name if " " in name else f"--{name.replace('_', '-')}"
