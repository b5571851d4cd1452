"""Levels of speed: cheaper ways to draw with an ensemble, found by `afa calibrate` and kept in its folder."""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from afa.checkpoint.manifest import AGGREGATORS, read_manifest
from afa.errors import UserError, unknown
from afa.files import settled, sha256
from afa.generation.settings import GenerateSettings
from afa.places import as_typed
from afa.schema import Like, Score, Sha256, Within, build, shown
from afa.text_files import read_json

SPEED = "speed.json"
ASKED = ("guidance", "scheduler", "width", "height")  # what a calibration depends on besides the ensemble


class Way(TypedDict):
    """A way to draw: options of `afa generate` by name; those that are missing are as without --speed."""

    steps: Annotated[int, Within(1, 10_000)]
    reuse: NotRequired[Annotated[int, Within(2, 100)]]
    reuse_outer: NotRequired[Annotated[int, Within(1, 100)]]
    lead: NotRequired[str]
    guidance_interval: NotRequired[Annotated[str, Like(r"[0-9.]+,[0-9.]+", "START,END such as 0,0.6")]]


class Tried(TypedDict):
    """A way that was tried.

    price:      operations, one step of one expert = 1
    seconds:    an image, on the device of the calibration
    scores:     (prompts,)
    score:      their mean
    difference: score minus that of the exact ensemble: value, low and high of the 95 % interval
    """

    way: Way
    price: Annotated[float, Within(0)]
    seconds: Annotated[float, Within(0)]
    scores: list[Score]
    score: Score
    difference: list[Score]


@dataclass
class Speed:
    """The content of speed.json.

    aggregators: sha256 of those that were calibrated
    settings:    of the calibration
    margins:     level -> how much lower a score may be; the lower end of the interval decides
    levels:      level -> way
    tried:       all ways, in order
    """

    aggregators: Sha256
    settings: dict[str, Any]
    margins: dict[str, Score] = field(default_factory=dict)
    levels: dict[str, Way] = field(default_factory=dict)
    tried: list[Tried] = field(default_factory=list)
    format: Literal[1] = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def of(self, way: Way) -> Tried | None:
        """Return what was measured of a way; None if it was not tried."""
        return next((tried for tried in self.tried if tried["way"] == way), None)


def read_speed(path: Path) -> Speed:
    """Read a file of levels. Raises UserError with the key that is wrong."""
    found: Speed = build(Speed, read_json(path, nan=True), path)
    return found


def at_level(settings: GenerateSettings) -> GenerateSettings:
    """Replace --speed by the options that the calibration of the ensemble found.

    Raises UserError if the ensemble has not been calibrated, or its aggregators have changed since.
    """
    if settings.speed is None:
        return settings
    folder = settled(Path(settings.sources[0]))
    path, advice = folder / SPEED, f"afa calibrate {as_typed(str(folder))} --prompts FILE"
    names = [entry.name for entry in read_manifest(folder).experts]
    if not path.is_file():
        raise UserError(f"{folder} has no levels of speed yet; find them with: {advice}")
    speed = read_speed(path)
    if speed.aggregators != sha256(folder / AGGREGATORS):
        raise UserError(
            f"{path} was made with other aggregators (sha256 {speed.aggregators[:12]}…); "
            f"calibrate again: {advice}"
        )
    if settings.speed not in speed.levels:
        raise UserError(f"{path} has no level '{settings.speed}'; calibrate again: {advice}")
    way = speed.levels[settings.speed]
    if way.get("lead", names[0]) not in names:
        raise UserError(f"{path}: {unknown(shown(way['lead'])[1:-1], names, 'expert')}")
    others = [
        f"--{name} {shown(speed.settings.get(name))}"
        for name in ASKED
        if getattr(settings, name) != speed.settings.get(name)
    ]
    if others:
        print(
            f"afa: --speed {settings.speed} was calibrated with {', '.join(others)}; "
            "how it is with other values was not measured",
            file=sys.stderr,
        )
    return replace(settings, speed=None, **way)
