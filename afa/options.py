"""A command's options are one flat dataclass; every field carries its own help. afa.cli.flags turns fields into flags."""

import dataclasses
from typing import Any


def option(default: Any = dataclasses.MISSING, *, help: str, positional: bool = False, choices: list[str] | None = None) -> Any:
    """A field that is a flag (or a positional argument), with its help. Without a default it is required."""
    metadata = {"help": help, "positional": positional, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
