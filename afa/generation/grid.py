"""Grids of images: two or three settings with several values each, as columns, rows and groups of rows.

Importing this module loads no torch; the options of `afa generate` check their grid here.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import UserError, unknown
from afa.seeds import nth_seed
from afa.settings import SEED, check_number

if TYPE_CHECKING:
    from PIL import Image

    from afa.generation.settings import GenerateSettings

ENSEMBLE = "afa"  # as a method: the saved ensemble itself
MOST = 400  # images
LINES = 4  # of a label


# axis -> what reads one of its values
AXES: dict[str, Callable[[str], Any]] = {
    "prompt": str,
    "seed": int,
    "method": str,
    "expert": str,
    "guidance": float,
    "true_guidance": float,
    "steps": int,
    "strength": float,
}
GIVEN = ("prompt", "seed")  # axes whose values other options give


@dataclass(frozen=True)
class GridAxis:
    """A setting with several values.

    name:   one of AXES
    expert: of a strength
    values: at least one, each once; of GIVEN empty where other options give them
    """

    name: str
    expert: str | None
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        """Return a value with its name, for the picture."""
        if self.name == "prompt":
            return str(value)
        name = self.expert or self.name.replace("_", " ")
        shown = f"{value:.16g}" if isinstance(value, float) else str(value)
        return shown if self.name in ("method", "expert") else f"{name} {shown}"


def read_axes(grid: Sequence[str]) -> list[GridAxis]:
    """Read --grid: each entry is AXIS or AXIS=VALUE,VALUE. Raises UserError."""
    if not 2 <= len(grid) <= 3:
        count = f"{len(grid)} ax{'i' if len(grid) == 1 else 'e'}s"
        raise UserError(
            f"--grid {' '.join(grid)} has {count}; give two or three: columns, rows, groups of rows"
        )
    axes = [_read_axis(text) for text in grid]
    keys = [(axis.name, axis.expert) for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--grid names {':'.join(filter(None, key))} twice; give each axis once")
    return axes


def _read_axis(text: str) -> GridAxis:
    name, equals, values = text.partition("=")
    name, colon, expert = name.partition(":")
    if name not in AXES:
        raise UserError(f"--grid {text}: {unknown(name, AXES, 'axis')}")
    if bool(colon) != (name == "strength") or (colon and not expert):
        raise UserError(f"--grid {text}: a strength is one of an expert, strength:NAME=0,0.5,1")
    if name == "prompt" and equals:
        raise UserError(f"--grid {text}: prompts hold commas; give them with --prompt, and --grid prompt")
    if name not in GIVEN and not equals:
        raise UserError(f"--grid {text} needs values: {text}=VALUE,VALUE")
    found = tuple(_value(text, name, value.strip()) for value in values.split(",")) if equals else ()
    if len(set(found)) < len(found):
        raise UserError(f"--grid {text} has a value twice; give each once")
    return GridAxis(name, expert or None, found)


def _value(text: str, name: str, value: str) -> Any:
    try:
        found = AXES[name](value)
    except ValueError:
        raise UserError(f"--grid {text}: '{value}' is no {'whole ' * (AXES[name] is int)}number") from None
    if name == "seed":
        check_number(found, f"--grid {text}: the seed is", whole=True, **SEED)
    if not value:
        raise UserError(f"--grid {text} has an empty value; leave it out")
    return found


def check_grid(settings: "GenerateSettings") -> None:
    """Raise UserError for a grid that cannot be drawn; each of its points is checked by itself."""
    axes = read_axes(settings.grid or ())
    for axis in axes:
        if axis.name not in GIVEN and axis.name != "strength" and getattr(settings, axis.name) is not None:
            value = getattr(settings, axis.name)
            flag = axis.name.replace("_", "-")
            raise UserError(f"--grid has an axis {axis.name}, and --{flag} {value} is given; leave out one")
    seeds = next((axis for axis in axes if axis.name == "seed"), None)
    if seeds and seeds.values and settings.seed != 0:
        raise UserError(
            f"--grid has an axis seed, and --seed {settings.seed} is given; leave out one of them"
        )
    if settings.images_per_prompt > 1 and (seeds is None or seeds.values):
        raise UserError(
            f"--images-per-prompt {settings.images_per_prompt} makes seeds, and the grid has "
            f"{'its own' if seeds else 'no axis for them'}; add the axis seed without values, or leave it out"
        )
    for point in points([axis for axis in axes if axis.name not in GIVEN]):
        changed(settings, point)


def points(axes: Sequence[GridAxis]) -> list[dict[GridAxis, Any]]:
    """Return all combinations of values; the first axis changes fastest."""
    combined = itertools.product(*(axis.values for axis in reversed(axes)))
    return [dict(zip(reversed(axes), values, strict=True)) for values in combined]


def changed(settings: "GenerateSettings", point: Mapping[GridAxis, Any]) -> "GenerateSettings":
    """Return the options of one point of a grid, checked. Raises UserError."""
    strengths, changes = list(settings.strength or ()), {}
    for axis, value in point.items():
        if axis.name == "strength":
            strengths.append(f"{axis.expert}={value}")
        elif axis.name not in GIVEN:
            changes[axis.name] = None if (axis.name, value) == ("method", ENSEMBLE) else value
    return replace(settings, grid=None, strength=strengths or None, **changes)


class Grid:
    """A grid of images.

    settings: the options, with a seed
    prompts:  all of them
    Raises UserError for several prompts without an axis, and for more than MOST images.
    """

    def __init__(self, settings: "GenerateSettings", prompts: Sequence[str]) -> None:
        counted = [nth_seed(settings.seed, index) for index in range(settings.images_per_prompt)]
        given = {"prompt": tuple(dict.fromkeys(prompts)), "seed": tuple(counted)}
        self.axes = [
            axis if axis.values else replace(axis, values=given[axis.name])
            for axis in read_axes(settings.grid or ())
        ]
        names = [axis.name for axis in self.axes]
        if len(given["prompt"]) > 1 and "prompt" not in names:
            raise UserError(f"there are {len(given['prompt'])} prompts, and the grid has no axis for them")
        others = [GridAxis(name, None, given[name]) for name in GIVEN if name not in names]
        self.points = points([*self.axes, *others])
        if len(self.points) > MOST:
            raise UserError(f"--grid has {len(self.points)} images; the most is {MOST}")
        self.variants: list[GenerateSettings] = []
        self.requests: list[list[tuple[str, int]]] = []  # prompts and seeds, by variant
        self.places: list[tuple[int, int]] = []  # by point: its variant, and its place among the requests
        for point in self.points:
            variant = changed(settings, point)
            if variant not in self.variants:
                self.variants.append(variant)
                self.requests.append([])
            index = self.variants.index(variant)
            found = {axis.name: value for axis, value in point.items()}
            self.places.append((index, len(self.requests[index])))
            self.requests[index].append((found["prompt"], found["seed"]))

    def path(self, folder: Path, facts: Mapping[str, Any]) -> Path:
        """Return the path of an image. It depends on facts alone, so that values can be added later."""
        from afa.fingerprint import digest

        words = re.sub(r"[^a-z0-9]+", "-", str(facts["prompt"]).lower()).strip("-")[:40].strip("-")
        return folder / f"{words or 'image'}-{facts['seed']}-{digest(facts)[:12]}.png"

    def picture(self, paths: Sequence[Sequence[Path]]) -> "Image.Image":
        """Draw the grid with its labels. paths: of all images, by variant and request."""
        from afa.images import read_pixels
        from afa.pictures import grid, label_size, wrapped

        images = [read_pixels(paths[variant][place]) for variant, place in self.places]
        width = images[0].shape[1]

        def label(axis: GridAxis, value: Any, room: int) -> str:
            return "\n".join(wrapped(axis.label(value), label_size(width), room, LINES))

        columns = self.axes[0]
        count = len(columns.values)
        rows = points(self.axes[1:])
        return grid(
            [images[start : start + count] for start in range(0, len(images), count)],
            [label(columns, value, width) for value in columns.values],
            ["\n".join(label(axis, value, max(160, width)) for axis, value in row.items()) for row in rows],
        )
