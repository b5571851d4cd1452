"""results.json: all measured values, with versions and machine."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from afa.errors import UserError
from afa.files import write_atomically
from afa.prompts import prompt_numbers
from afa.schema import Count, Like, Score, Within, build, shown
from afa.text_files import read_json
from afa.version import __version__

FILE = "results.json"
FORMAT = 1
INSIDE = r"(?!/)(?!.*(^|[/\\])\.\.([/\\]|$))[^\x00-\x1f]*"  # of results.json's folder; empty: no images
GROUPS = (
    "expert",
    "merge",
    "sampling",
    "control",
    "ours",
    "bound",
)  # kinds of methods, in the order of the table


@dataclass(frozen=True)
class Item:
    """One image that every method makes.

    prompt:  its index
    caption: its text
    seed:    of its noise
    """

    prompt: Count
    caption: str
    seed: int


def prompts_of(items: Sequence[Item]) -> list[int]:
    """Return the independent prompt of each image, see prompt_numbers."""
    return prompt_numbers([item.caption for item in items])


def image_name(index: int) -> str:
    """Return the name of an item's image in the folder of its run."""
    return f"{index:06d}.png"


@dataclass(frozen=True)
class MetricNote:
    """What a score means.

    kind:    image (a value per image) or set (one value for all)
    primary: whether it leads the table
    """

    kind: Literal["image", "set"]
    higher_is_better: bool
    source: str
    primary: bool = False


@dataclass(frozen=True)
class SetScore:
    """A value of a whole set of images, and its values under resampled prompts.

    replicates: number r is of the same resampled prompts in all methods, so differences are paired
    n:          images
    """

    value: Score
    replicates: list[Score]
    n: Count


@dataclass(frozen=True)
class Run:
    """One method with one training seed (0 if it is not trained).

    images:    folder of its PNGs, relative to results.json
    scores:    by metric, one value per item
    sets:      by metric, one value for all items
    seconds:   per image, one value per item
    memory_mb: peak of the process while it made them
    """

    seed: int
    images: Annotated[str, Like(INSIDE, "a path inside the folder")]
    scores: dict[str, list[Score]]
    sets: dict[str, SetScore] = field(default_factory=dict)
    seconds: list[Score] = field(default_factory=list)
    memory_mb: float | None = None


@dataclass(frozen=True)
class Method:
    """One row of the results.

    group: one of GROUPS
    axes:  its values in a study, e.g. {"steps": 10}, {"experts": 2} or {"variant": "no text"}; empty for the
           rows of the main table
    of:    the method that a variant was derived from (its own name in the main table)
    """

    name: Annotated[str, Within(1, 1000)]
    group: Literal["expert", "merge", "sampling", "control", "ours", "bound"]
    title: str
    runs: Annotated[list[Run], Within(1)]
    axes: dict[str, Any] = field(default_factory=dict)
    of: str = ""
    trained_parameters: Count = 0
    training_steps: Count = 0
    training_seconds: list[Score] = field(default_factory=list)  # one a run
    note: str = ""

    @property
    def is_trained(self) -> bool:
        """Return whether its runs are training seeds; an untrained method has one run for all seeds."""
        return self.trained_parameters > 0 or len(self.runs) > 1

    @property
    def memory_mb(self) -> float | None:
        """Return the largest peak of its runs; None if none was measured."""
        return max((run.memory_mb for run in self.runs if run.memory_mb is not None), default=None)


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    protocol: the settings that all methods share, or the several values of a setting
    errors:   sentences about what could not be computed
    own:      by method of the main table and study: its own value of each setting that has several,
              {"afa": {"guidance": 4.0}}; empty if each has one
    """

    protocol: dict[str, Any]
    items: list[Item]
    metrics: dict[str, MetricNote]
    methods: list[Method]
    errors: list[str] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)  # name, source, sha256 of files
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    own: dict[str, dict[str, float]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON has it; own only if there is something in it."""
        return {name: value for name, value in asdict(self).items() if name != "own" or value}

    def save(self, folder: Path) -> None:
        """Write results.json whole or not at all."""
        write_atomically(
            folder / FILE, json.dumps({"format": FORMAT, **self.facts()}, indent=1, ensure_ascii=False)
        )

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read what save wrote. Raises UserError if there is no file, or it has another format."""
        file = folder / FILE
        if not file.is_file():
            raise UserError(f"{folder} has no {FILE}; make it with: afa evaluate … --output {folder}")
        found = read_json(file, nan=True)
        version = found.pop("format", None) if isinstance(found, dict) else None
        if version != FORMAT or isinstance(version, bool):
            raise UserError(
                f"{file} is of format {shown(version)}, expected {FORMAT}; make it again with this version"
            )
        results: Results = build(cls, found, file)
        results.check(file)
        return results

    def check(self, file: Path) -> None:
        """Raise UserError for parts that do not fit each other, such as a score without its image."""
        names = [method.name for method in self.methods]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{file}: methods has {shown(twice)} twice")
        for place, method in enumerate(self.methods):
            for number, run in enumerate(method.runs):
                at = f"{file}: methods[{place}].runs[{number}]"
                for name, values in {**run.scores, "seconds": run.seconds}.items():
                    if len(values) > len(self.items):
                        raise UserError(
                            f"{at} has {len(values)} values of {shown(name)} for {len(self.items)} items"
                        )


PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that affect numbers."""
    found = {"afa": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    """Describe the accelerator, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
