"""Recipes: TOML files whose keys are a command's flags. No heavy imports: the command line's help needs them."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.lookup import unknown
from afa.options import check_value
from afa.schema import build, shown
from afa.text_files import read_toml

PLACES = {"train": Path(__file__).parent / "training" / "recipes"}  # command -> the recipes that are shipped


def names(command: str) -> list[str]:
    """The recipes that a command brings along."""
    return sorted(file.stem for file in PLACES[command].glob("*.toml"))


def read_recipe(command: str, recipe: str, options: type) -> dict[str, Any]:
    """What a recipe sets, by field of the options. recipe: a shipped one's name, or a .toml file.

    Raises UserError for a recipe that is not there, a key that is no flag, or a value of another kind.
    """
    file = Path(recipe) if recipe.endswith(".toml") else PLACES[command] / f"{recipe}.toml"
    if not file.is_file():
        known = unknown(recipe, names(command), "recipe")
        raise UserError(f"--recipe: {known}; or give a .toml file" if file.parent == PLACES[command] else f"--recipe {file} is not there")
    found = read_toml(file)
    hints = typing.get_type_hints(options)
    fields = {field.name: field for field in dataclasses.fields(options) if field.name != "recipe"}
    recipe_values = {}
    for key, value in found.items():
        name = _field(command, file, key, list(fields))
        recipe_values[name] = _checked(file, key, value, hints[name])
        check_value(options, fields[name], recipe_values[name], f"--recipe {file}: {key}")
    return recipe_values


def _field(command: str, file: Path, key: str, flags: list[str]) -> str:
    name = key.replace("-", "_")
    if name not in flags:
        told = unknown(name, flags, "flag").partition(" Known:")[0].replace("_", "-")
        raise UserError(f"--recipe {file}: {told} All are shown by: afa {command} --help")
    return name


def _checked(file: Path, key: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it."""
    checked = build(hint, value, f"--recipe {file}", key)
    if isinstance(checked, str) and checked.lower().endswith(".py"):
        raise UserError(f"--recipe {file}: {key} is {shown(checked)}, and a recipe may not name code to run; give it as a flag: --{key.replace('_', '-')}")
    return checked
