"""results.json: everything measured, raw, with versions and machine."""

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
    """One image that every method makes: the prompt's index, its words, the seed of its noise."""

    prompt: Count
    caption: str
    seed: int


def prompts_of(items: Sequence[Item]) -> list[int]:
    """The independent prompt of each image, counted from 0: equal words are one prompt, wherever they stand in a list.

    Images of one prompt are draws of it, not prompts of their own; statistics average them first.
    """
    numbers: dict[str, int] = {}
    return [numbers.setdefault(" ".join(item.caption.split()), len(numbers)) for item in items]


@dataclass(frozen=True)
class MetricNote:
    """What a score's name means. kind: image (a value an image) or set (one for all). primary: leads the table."""

    kind: Literal["image", "set"]
    higher_is_better: bool
    source: str
    primary: bool = False


@dataclass(frozen=True)
class SetScore:
    """A value of a whole set of images, and the same under shared resamplings of the prompts.

    replicates[r] of every method comes from the same resampled prompts, so differences of replicates are paired.
    n: images.
    """

    value: Score
    replicates: list[Score]
    n: Count


@dataclass(frozen=True)
class Run:
    """One method with one training seed (0 for what is not trained).

    images: folder of its PNGs, relative to results.json. scores: by metric, a value an item. seconds: an image, one value
    an item; memory_mb: peak of the process while it made them.
    """

    seed: int
    images: Annotated[str, Like(INSIDE, "a path inside the folder")]
    scores: dict[str, list[Score]]
    sets: dict[str, SetScore] = field(default_factory=dict)
    seconds: list[Score] = field(default_factory=list)
    memory_mb: float | None = None


@dataclass(frozen=True)
class Method:
    """One row. group: one of GROUPS. title: for people. axes: where it stands in a study, e.g. {"steps": 10} or
    {"experts": 2} or {"variant": "no text"}; empty for the rows of the main table.

    of: the method a variant was derived from (its own name in the main table).
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
        """Whether its runs are training seeds; what is not trained has one run, the same for every seed."""
        return self.trained_parameters > 0 or len(self.runs) > 1


@dataclass(frozen=True)
class Results:
    """A whole comparison. protocol: what was asked of every method. errors: what could not be computed, as sentences."""

    protocol: dict[str, Any]
    items: list[Item]
    metrics: dict[str, MetricNote]
    methods: list[Method]
    errors: list[str] = field(default_factory=list)
    experts: list[dict[str, Any]] = field(default_factory=list)  # name, source, sha256 of files
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""

    def save(self, folder: Path) -> None:
        """Write results.json whole or not at all."""
        write_atomically(
            folder / FILE, json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        )

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read what save wrote. Raises UserError if there is nothing, or of another format."""
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
        """Raises UserError for parts that do not fit each other, such as a score without its image."""
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
    """Of this package and of those whose versions change numbers."""
    found = {"afa": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    """In words: the accelerator, or the processor's kind and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
