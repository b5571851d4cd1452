"""The options of commands: dataclass fields with help and bounds, and recipes, which preset them from TOML.

A command has one flat dataclass of options. afa.cli.flags makes a flag of every field. The command line,
recipes and Python all make the same dataclass, and it checks its values itself.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack

from afa.errors import UserError, unknown
from afa.places import located
from afa.schema import build, shown
from afa.text_files import read_toml

SEEDS = 2**64  # as many seeds as torch's generators and other programs know


class Bounds(TypedDict, total=False):
    """The bounds of a number.

    least, most:  the smallest and the largest value
    above, below: the same, without the bound itself
    multiple:     a whole number must be a multiple of it
    """

    least: float
    most: float
    above: float
    below: float
    multiple: int


# bound -> whether a value exceeds it, and how a message says so
LIMITS = (
    ("least", operator.lt, "small", "the least is"),
    ("above", operator.le, "small", "it must be above"),
    ("most", operator.gt, "large", "the most is"),
    ("below", operator.ge, "large", "it must be below"),
)
# Bounds that many commands share.
COUNT: Bounds = {"least": 1, "most": 10**6}  # of images, steps, trials: what is listed before it is made
SAMPLING_STEPS: Bounds = {"least": 1, "most": 10_000}
GUIDANCE: Bounds = {"least": 0, "most": 1000}
SIDE: Bounds = {"least": 8, "most": 2**16, "multiple": 8}  # pixels
SHARE: Bounds = {"least": 0, "most": 1}
WEIGHT: Bounds = {"least": 0, "most": 10**6}
SEED: Bounds = {"least": 0, "most": SEEDS - 1}
SEED_OR_DRAWN: Bounds = {"least": -1, "most": SEEDS - 1}  # -1: one is drawn, see afa.seeds

# Help that many commands share.
DTYPES = ["float32", "bfloat16", "float16"]
DTYPE_HELP = "number format of the models' weights"
STORES = ["int8", "fp8", "delta2", "delta1", "cpu"]  # of afa.experts.quantised
SHARDED = "sharded"  # over processes that run the same steps: of training alone
RESIDENT = "resident"  # weights as they are, on the device
STORE_HELP = (
    "how the experts' weights are stored: in 8 bits; as one mean in 8 bits and each expert's difference from "
    "it in 2 bits or 1; in the CPU's memory until they are needed"
)
LEVELS = ["exact", "balanced", "fast"]  # of speed, see afa.generation.speed
DEVICE_HELP = "where to compute: cpu, cuda, mps … (default: the fastest that is there)"
CONFIG_HELP = (
    "architecture of single files: sd15, sd21, sdxl, sd3, sd35, flux … or a folder (default: detected)"
)
FRAME_HELP = (
    "a pipeline's folder, which gives text encoders, scheduler and VAE to experts that are denoisers alone; "
    "or org/name@revision of the hub, of which configs and tokenizers are read (a few MB)"
)
TEXT_ENCODER_HELP = (
    "text encoders for experts that are denoisers alone: .safetensors or .gguf files or folders, in any order"
)
VAE_HELP = "an expert's name, a VAE's or pipeline's folder, or one .safetensors file"
MOVED_HELP = (
    "new places of a saved ensemble's experts that have moved, each NAME=PLACE, or folders to search for "
    "them by sha256"
)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    positional: bool = False,
    choices: list[str] | Callable[[], list[str]] | None = None,
    place: bool = False,
    ensemble: bool = False,
    also: str | None = None,
    **bounds: Unpack[Bounds],
) -> Any:
    """A dataclass field that is a flag, or a positional argument. Without a default it is required.

    default:    its value if it is not given
    help:       one clause for `afa VERB --help`
    positional: whether it has no flag
    choices:    the allowed values; a function where a registry holds them
    place:      whether it names models: demo:NAME is then replaced by the folder of the embedded model
    ensemble:   whether it names a saved ensemble, which may be on the hub: see afa.cli.main
    also:       another name of the flag
    bounds:     of a number, or of each number of a list
    """
    metadata = {"help": help, "positional": positional, "choices": choices, "place": place, "also": also}
    metadata |= {"bounds": bounds, "ensemble": ensemble}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class CheckedOptions:
    """Base class of options: checks types, bounds and choices when it is made, and finds embedded models.

    prefix: stands before the names of fields in messages; empty for options that are no flags
    """

    prefix: ClassVar[str] = "--"
    free: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def current(cls) -> type[Self]:
        """Return the class whose fields are the flags; settings with flags from a registry override it."""
        return cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            name = field.name.replace("_", "-") if self.prefix else field.name
            value = getattr(self, field.name)
            check_value(type(self), field, value, f"{self.prefix}{name}")
            if field.metadata.get("place") and value is not None:
                found = [located(one) for one in value] if isinstance(value, list) else located(value)
                object.__setattr__(self, field.name, found)

    def binding(self) -> dict[str, Any]:
        """Return the options that must stay the same when a run is resumed or extended."""
        names = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names if name not in self.free}


def choices_of(field: dataclasses.Field[Any]) -> list[str] | None:
    """The values that a field allows; None: any."""
    choices = field.metadata.get("choices")
    found: list[str] | None = choices() if callable(choices) else choices
    return found


def check_value(options: type, field: dataclasses.Field[Any], value: Any, name: str) -> None:
    """Check the value of one field.

    options: the dataclass of the field
    field:   the field
    value:   one value or a list; None if the field may be left out
    name:    how the message calls it, for example --steps
    Raises UserError for a value that the field does not allow.
    """
    kind, several = kind_of(_hints(options)[field.name])
    choices = choices_of(field)
    if value is None or (kind not in (int, float) and choices is None):
        return
    for one in value if several and isinstance(value, (list, tuple)) else [value]:
        if choices is not None and one not in choices:
            raise UserError(f"{name}: {unknown(str(one), choices, 'value')}")
        if kind in (int, float):
            check_number(one, name, whole=kind is int, **field.metadata.get("bounds", {}))


def check_number(value: Any, name: str, whole: bool = False, **bounds: Unpack[Bounds]) -> None:
    """Check one number.

    value:  what was given
    name:   how the sentence begins: a flag, or words that end with "is", such as "the weight of 'a' is"
    whole:  whether it must be a whole number
    bounds: see Bounds
    Raises UserError for anything else than a finite number within the bounds.
    """
    named = not name.endswith(" is")  # a flag and its value are the subject; else they are a clause already
    if isinstance(value, bool) or not isinstance(value, (int, Integral) if whole else (int, float, Real)):
        kind = "whole number" if whole else "number"
        raise UserError(f"{name} {str(value)[:40]!r}{f' is no {kind}' if named else f'; give a {kind}'}")
    given = f"{name} {value if whole else f'{float(value):.16g}'}"
    if not math.isfinite(value):
        raise UserError(
            f"{given}{' is no finite number; give one' if named else '; give a finite number'}"
            f"{_range(bounds)}"
        )
    number: Any = value  # isinstance() has narrowed the type too far for comparisons
    limits: Mapping[str, Any] = bounds
    for bound, exceeds, size, must in LIMITS:
        if bound in limits and exceeds(number, limits[bound]):
            raise UserError(f"{given}{f' is too {size}' if named else ''}; {must} {limits[bound]}")
    if "multiple" in bounds and number % bounds["multiple"]:
        unit = bounds["multiple"]
        nearest = max(1, round(number / unit)) * unit
        raise UserError(
            f"{given}{' must be' if named else '; it must be'} a multiple of {unit}; {nearest} is the nearest"
        )


Interval = tuple[float, float]  # shares of the steps, 0 to 1: where something begins and ends


def check_interval(interval: Interval, name: str) -> None:
    """Raise UserError for what is no interval of shares. name: as in check_number"""
    for share in interval:
        check_number(share, name, **SHARE)
    start, end = interval
    if start >= end:
        raise UserError(f"{name} {start:g},{end:g} contains no step; give the smaller share first")


def shares(weights: Sequence[float] | None, count: int, of: str = "") -> tuple[float, ...]:
    """Weights of experts as shares that sum to 1.

    weights: one number per expert, in any unit; None: equal
    count:   number of experts
    of:      what they are the weights of, for messages, if there are several sets
    Returns `count` shares.
    Raises UserError if there are not `count` finite numbers of at least 0 with a sum above 0.
    """
    weights = [1.0] * count if weights is None else weights
    named = f" of {of}" if of else ""
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights{named} for {count} experts; give one for each")
    for weight in weights:
        check_number(weight, f"the weight{named} is" if of else "a weight is")
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < math.inf:
        listed = " ".join(f"{weight:g}" for weight in weights)
        raise UserError(
            f"weights {listed}{named} are no shares; give numbers of at least 0 with a sum above 0 that is "
            "finite"
        )
    return tuple(weight / total for weight in weights)


def one_ahead(count: int) -> list[list[float]]:
    """Sets of weights to try for `count` experts: equal, then each expert with 0.6 and the rest equal."""
    if count == 1:
        return [[1.0]]
    others = 0.4 / (count - 1)
    ahead = [[0.6 if place == first else others for place in range(count)] for first in range(count)]
    return [[1 / count] * count, *ahead]


def kind_of(hint: Any) -> tuple[type, bool]:
    """What the type hint of a field says.

    hint: for example int, str | None, list[float] | None
    Returns the type of one value, and whether the field takes several values.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _range(bounds: Bounds) -> str:
    """The bounds in words, each with a space before it."""
    words = {"least": "from", "above": "above", "most": "to", "below": "below"}
    given: Mapping[str, Any] = bounds
    return "".join(f" {word} {given[name]}" for name, word in words.items() if name in given)


@functools.cache
def _hints(options: type) -> dict[str, Any]:
    return typing.get_type_hints(options)


PLACES = {"train": Path(__file__).parent / "training" / "recipes"}  # command -> the recipes that are shipped


def names(command: str) -> list[str]:
    """The names of the recipes that come with a command."""
    return sorted(file.stem for file in PLACES[command].glob("*.toml"))


def read_recipe(command: str, recipe: str, options: type) -> dict[str, Any]:
    """The values that a recipe sets.

    command: the verb, for example train
    recipe:  the name of a shipped recipe, or a .toml file
    options: the dataclass of the verb's options
    Returns field -> value.
    Raises UserError for a recipe that is not there, a key that is no flag, or a value that does not fit its
    flag.
    """
    file = Path(recipe) if recipe.endswith(".toml") else PLACES[command] / f"{recipe}.toml"
    if not file.is_file():
        known = unknown(recipe, names(command), "recipe")
        raise UserError(
            f"--recipe: {known}; or give a .toml file"
            if file.parent == PLACES[command]
            else f"--recipe {file} is not there"
        )
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
        sentence = unknown(name, flags, "flag").partition(" Known:")[0].replace("_", "-")
        raise UserError(f"--recipe {file}: {sentence} All are shown by: afa {command} --help")
    return name


def _checked(file: Path, key: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it. Raises UserError for another type, and for code to run."""
    checked = build(hint, value, f"--recipe {file}", key)
    if isinstance(checked, str) and checked.lower().endswith(".py"):
        raise UserError(
            f"--recipe {file}: {key} is {shown(checked)}, and a recipe may not name code to run; "
            f"give it as a flag: --{key.replace('_', '-')}"
        )
    return checked
