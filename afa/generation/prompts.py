"""Read prompts: from the command line, or from a file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.text_files import check_text, clean, read_json_lines, read_text, split_lines

OBJECT = re.compile(r'\{\s*("|$)')  # how a line of JSON begins, and a line of wildcards, {red|blue} ring, does not


def asked_prompts(prompt: Sequence[str] | None, file: str | None) -> list[str]:
    """The prompts of --prompt, or of the file of --prompts. Raises UserError for what is no text."""
    if prompt is None:
        return read_prompts(Path(str(file)))
    return [check_text(text, f"--prompt {number}") for number, text in enumerate(prompt, 1)]


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, or JSON lines with "text"; empty lines are passed over. Raises UserError if there is none."""
    if not path.is_file():
        raise UserError(f"--prompts {path} is no file")
    lines = [line for line in map(clean, split_lines(read_text(path))) if line]
    if path.suffix in (".jsonl", ".ndjson") or all(OBJECT.match(line) for line in lines):
        lines = [_text(place, entry) for place, entry in read_json_lines(path)]
    if not lines:
        raise UserError(f"--prompts {path} holds no prompt")
    return lines


def _text(place: str, entry: Any) -> str:
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place} has no "text"')
    return text
