"""Read prompts from a file."""

import json
from pathlib import Path

from afa.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, or JSON lines with "text"; empty lines are passed over. Raises UserError if there is none."""
    if not path.is_file():
        raise UserError(f"--prompts {path} is no file")
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    structured = path.suffix in (".jsonl", ".ndjson") or all(line.startswith("{") for line in lines if line)
    prompts = [_text(line, path, number) if structured else line for number, line in enumerate(lines, 1) if line]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")
    return prompts


def _text(line: str, path: Path, number: int) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{path}, line {number} has no "text"')
    return text
