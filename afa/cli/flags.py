"""Flags of the command line from the fields of a command's options."""

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from afa.settings import choices_of, kind_of


def add_flags(
    parser: argparse.ArgumentParser, options: type, preset: Mapping[str, Any] | None = None
) -> None:
    """Add one flag per field, the required ones first.

    A list takes several values, a bool is a switch, and None means that the flag is not given.
    options: a dataclass
    preset:  field -> value of a recipe, which replaces the default
    """
    hints = typing.get_type_hints(options)
    for field in sorted(dataclasses.fields(options), key=lambda field: not _required(field)):
        settings = _settings(field, hints[field.name])
        if preset is not None and field.name in preset:
            settings |= {"default": preset[field.name], "required": False}
        parser.add_argument(*_names(field), **settings)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read_flags(options: type, arguments: argparse.Namespace) -> Any:
    """Return the options as given; the dataclass checks them."""
    return options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(options)})


def _names(field: dataclasses.Field[Any]) -> list[str]:
    if field.metadata["positional"]:
        return [field.name]
    return [
        f"--{field.name.replace('_', '-')}",
        *([field.metadata["also"]] if field.metadata["also"] else []),
    ]


def _settings(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    kind, several = kind_of(hint)
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    required = default is dataclasses.MISSING
    shown = (
        ""
        if required or default is None or default is False or default == []
        else f" (default: {' '.join(map(str, default)) if several else default})"
    )
    settings: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%") + shown}
    if kind is bool:
        return settings | {"action": "store_true"}
    settings |= {"type": kind, "choices": choices_of(field)}
    if several:
        settings["nargs"] = "+" if required or not field.metadata["positional"] else "*"
    if field.metadata["positional"]:
        optional = {} if required else {"default": default} | ({} if several else {"nargs": "?"})
        return settings | {"metavar": field.name.upper().rstrip("S")} | optional
    if field.metadata["choices"] is None:
        settings["metavar"] = kind.__name__.upper() if kind is not str else field.name.upper()
    return settings | {"required": required, "default": None if required else default}
