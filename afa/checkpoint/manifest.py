"""afa.json: what it holds, and how aggregators are stored beside it.

afa.json: what an ensemble is, so that it can be found, checked and made again.

A manifest may come from a stranger: it is validated as a whole before anything of it is used, and names only
places of weights.
"""

import importlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from torch import Tensor, nn

from afa.aggregators.registry import Recipe
from afa.checkpoint.release import is_release, read_release
from afa.errors import UserError, unknown
from afa.experts.expert import Expert
from afa.experts.headers import first_not_finite, load_tensors, read_file
from afa.experts.locate import Located
from afa.experts.single_file import KNOWN_CONFIGS
from afa.experts.spec import HUB_ID, ExpertSpec, Lora
from afa.files import settled, sha256
from afa.models.registry import FAMILIES
from afa.places import check_name, located, spelled
from afa.schema import Count, Like, Score, Sha256, Within, build, hints_of, shown
from afa.text_files import read_json

FORMAT: Literal[1] = 1
MANIFEST = "afa.json"
AGGREGATORS = "aggregators.safetensors"
FRAME = ("vae", "tokenizer", "scheduler", "frame")
PLACE = Annotated[str, Within(1, 4096)]  # a path or a hub id
RECORDED_SETTINGS = "afa.training.settings"  # where the options of a recorded training are declared
MEASURED = (
    "settings",
    "training_images",
    "steps",
    "best_step",
    "best_expert",
    "difference_to_best_expert",
)  # beside held_out_loss


class LoraEntry(TypedDict):
    """A LoRA of an expert: its place from the manifest, and how strongly it counts."""

    path: PLACE
    strength: Annotated[float, Within(-1000, 1000)]


class StageEntry(TypedDict):
    """One stage of the experts, and whether an aggregator stands there."""

    name: Annotated[str, Like("[A-Z]{1,8}[0-9]{0,4}", "a stage such as OUT11")]
    channels: Annotated[int, Within(1, 10**6)]
    level: Annotated[int, Within(0, 16)]
    fused: bool


class AggregatorEntry(TypedDict):
    """How the aggregators are made, how many numbers they have, and the hash of their file."""

    kind: str
    options: dict[str, Any]
    attention_up_to: Annotated[int, Within(0, 10**6)] | None
    text_stream: NotRequired[Literal["own", "fused"]]
    parameters: Count
    sha256: Sha256


class Loss(TypedDict):
    """A measured value with its interval, of n images."""

    value: Score
    low: Score
    high: Score
    n: NotRequired[Count]


class Losses(TypedDict):
    """What training measured on the held-out images: of the trained, and of others by name."""

    trained: Loss


class Measurement(TypedDict, total=False):
    """One line of a training's course; what watches it may add numbers of its own."""

    step: Count
    training_loss: Score | None
    held_out_loss: Score
    objective: Score
    terms: dict[str, Score]


class TrainingRecord(TypedDict, total=False):
    """What training was asked for and measured.

    Aggregators from elsewhere may have less, or something else.
    """

    settings: dict[str, Any]
    afa: str
    torch: str
    training_images: Count
    steps: Count
    best_step: Count
    seconds: Annotated[float, Within(0)]
    held_out_loss: dict[str, Loss]
    best_expert: str
    difference_to_best_expert: Loss
    difference_to_untrained_mean: Loss
    history: list[Measurement]
    left_out: dict[str, Count]


@dataclass
class ExpertEntry:
    """One expert of a manifest.

    source: a hub id, or a path relative to the manifest. commit: the hub's full hash. config: of a single
    file.
    files: sha256 of every file that decides what the expert computes; loras: path and strength.
    """

    name: str
    source: PLACE
    commit: Annotated[str, Like("[0-9A-Za-z]{1,64}", "a commit's letters and digits")] | None = None
    config: PLACE | None = None
    loras: list[LoraEntry] = field(default_factory=list)
    files: dict[str, Sha256] = field(default_factory=dict)
    prediction_type: str | None = None

    def spec(self, folder: Path) -> ExpertSpec:
        """How to find this expert again, from the ensemble's folder."""
        path = folder / located(self.source)
        source = str(path) if self.commit is None or path.exists() else self.source
        loras = tuple(Lora(str(folder / lora["path"]), lora["strength"]) for lora in self.loras)
        return ExpertSpec(self.name, source, self.commit, loras, str(folder / MANIFEST))


@dataclass
class Manifest:
    """What is written to afa.json.

    frame: which VAE, tokenizer and scheduler serve the ensemble: an expert's name or a path; and the frame
    that lends experts their text encoders, if it is none of them. placement: a name or a list.
    """

    family: str
    experts: Annotated[list[ExpertEntry], Within(1, 64)]
    frame: dict[str, PLACE]
    placement: str | list[str]
    stages: Annotated[list[StageEntry], Within(1, 10_000)]
    aggregator: AggregatorEntry
    training: TrainingRecord | None = None
    afa_version: str = ""
    format: Literal[1] = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read an ensemble's manifest.

    Raises UserError, naming the key, if there is none, or one that is not as it has to be.
    """
    path = settled(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no ensemble: it has no {MANIFEST}")
    data = read_json(path, nan=True)
    found = data.get("format") if isinstance(data, dict) else None
    if type(found) is int and found != FORMAT:
        raise UserError(
            f"{path} has format {found}, this afa reads {FORMAT}; "
            f"use the afa that wrote it ({shown(data.get('afa_version'))})"
        )
    manifest: Manifest = build(Manifest, data, path)
    _check_whole(manifest, path)
    return manifest


def _check_whole(manifest: Manifest, path: Path) -> None:
    """Raises UserError for parts of a manifest that do not fit each other."""
    names = [entry.name for entry in manifest.experts]
    for place, entry in enumerate(manifest.experts):
        check_name(entry.name, f"{path}: experts[{place}]")
        if entry.commit is not None and not HUB_ID.fullmatch(entry.source):
            raise UserError(
                f"{path}: experts[{place}].source is {shown(entry.source)}, expected a hub id org/name, "
                "since it has a commit"
            )
    _refuse_twice(names, f"{path}: experts")
    stages = [stage["name"] for stage in manifest.stages]
    _refuse_twice(stages, f"{path}: stages")
    for part in manifest.frame:
        if part not in FRAME:
            raise UserError(f"{path}: frame: {unknown(shown(part)[1:-1], FRAME, 'part')}")
    _check_tables(manifest, path, stages)
    record = manifest.training or {}
    if "settings" in record:
        check_recorded(record["settings"], path, "training.settings")
    if "held_out_loss" in record:
        for key in (
            *(key for key in MEASURED if key not in record),
            *({"trained"} - record["held_out_loss"].keys()),
        ):
            raise UserError(f"{path}: training has a held_out_loss, but no {key}")


def _check_tables(manifest: Manifest, path: Path, stages: list[str]) -> None:
    """Raise UserError for an unknown family, kind of aggregator or option, or for impossible fused stages."""
    from afa.aggregators.registry import AGGREGATORS as KINDS
    from afa.aggregators.registry import check_options
    from afa.models.registry import FAMILIES

    entry = manifest.aggregator
    for key, name, table in (
        ("family", manifest.family, FAMILIES),
        ("aggregator.kind", entry["kind"], KINDS),
    ):
        if name not in table:
            raise UserError(f"{path}: {key}: {unknown(shown(name)[1:-1], table, key.rpartition('.')[2])}")
    check_options(entry["kind"], entry["options"], str(path))
    fused = [stage["name"] for stage in manifest.stages if stage["fused"]]
    if isinstance(manifest.placement, list) and sorted(manifest.placement) != sorted(fused):
        other = next(iter(sorted({*manifest.placement} ^ {*fused})), "a stage twice")
        raise UserError(f"{path}: placement and stages do not agree on which are fused: {shown(other)[1:-1]}")
    if not manifest.stages[-1]["fused"]:
        raise UserError(
            f"{path}: stages[{len(stages) - 1}].fused is false; the last stage is always fused, "
            "since it makes the prediction"
        )


def check_recorded(settings: dict[str, Any], where: object, key: str) -> None:
    """Raise UserError for recorded training settings with values of another type than the option's.

    Options that this version does not know are left alone: a later one may have written them.
    """
    hints = hints_of(importlib.import_module(RECORDED_SETTINGS).TrainSettings.current())
    for name, value in settings.items():
        build(hints.get(name, Any), value, where, f"{key}.{name}")


def _refuse_twice(names: Collection[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where} has '{name}' twice; every one needs a name of its own")
        seen.add(name)


def entry_for(
    found: Located, folder: Path, files: dict[str, str], config: str | None, prediction_type: str | None
) -> ExpertEntry:
    """The entry of an expert at the place it is."""
    spec = found.spec
    hub = found.commit is not None
    loras: list[LoraEntry] = [
        {"path": relative(Path(lora.path), folder), "strength": lora.strength} for lora in spec.loras
    ]
    return ExpertEntry(
        name=spec.name,
        source=spec.source if hub else spelled(found.path) or relative(found.path, folder),
        commit=found.commit,
        config=config if config is None or config in KNOWN_CONFIGS else relative(Path(config), folder),
        loras=loras,
        files=files,
        prediction_type=prediction_type,
    )


def relative(path: Path, folder: Path) -> str:
    """A path as it is written from a folder."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def check_hashes(entry: ExpertEntry, located: Located) -> None:
    """Raise UserError, with the file and both hashes, if an expert differs from the recorded one."""
    from afa.experts.locate import expert_files, recorded_files
    from afa.files import sha256

    files = recorded_files(located, entry.files)
    for name, expected in entry.files.items():
        if name not in files:
            raise UserError(
                f"expert '{entry.name}': {os.path.normpath(located.path)} has no {name}, "
                f"which the ensemble was made with (sha256 {expected})"
            )
        found = sha256(files[name])
        if found != expected:
            raise UserError(
                f"expert '{entry.name}' has changed: {name} in {os.path.normpath(located.path)} has sha256 "
                f"{found}, the ensemble was made with {expected};"
                " restore the file or train again"
            )
    strange = (
        next((name for name in expert_files(located) if name not in entry.files), None)
        if entry.files
        else None
    )
    if strange is not None:
        raise UserError(
            f"expert '{entry.name}' has changed: {located.path} is now loaded from {strange}, "
            "which the ensemble was not made with;"
            " take it away or train again"
        )


def read_aggregators(
    folder: Path, expert: Expert, experts: int
) -> tuple[Recipe, str | list[str], dict[str, Tensor]]:
    """-> recipe, placement and tensors of trained aggregators.

    Raises UserError if they do not fit the experts.
    """
    stages = FAMILIES[expert.family].stages(expert.model)
    if is_release(settled(folder)):
        recipe, tensors = read_release(folder, stages, experts)
        return recipe, "layers", tensors
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} holds no aggregators: neither {MANIFEST} nor aggregator_0/config.json is there"
        )
    manifest = read_manifest(folder)
    if len(manifest.experts) != experts:
        raise UserError(
            f"{folder} has aggregators for {len(manifest.experts)} experts, {experts} are given; "
            "they must be as many, in the same order"
        )
    shapes = [(stage["name"], stage["channels"]) for stage in manifest.stages]
    if shapes != [(stage.name, stage.channels) for stage in stages]:
        raise UserError(
            f"{folder} has aggregators for other stages than the experts have; "
            "they belong to another architecture"
        )
    check_file(folder, manifest)
    return recipe_of(manifest), manifest.placement, read_tensors(folder)


def recipe_of(manifest: Manifest) -> Recipe:
    """How a manifest's aggregators are made."""
    entry = manifest.aggregator
    return Recipe(entry["kind"], entry["options"], entry["attention_up_to"], entry.get("text_stream", "own"))


def check_file(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if the aggregators' file is missing, broken, or does not match the manifest.

    By hash and header: nothing has been allocated for sizes that a stranger wrote.
    """
    path, entry = folder / AGGREGATORS, manifest.aggregator
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: it has no {AGGREGATORS}")
    if (digest := sha256(path)) != entry["sha256"]:
        raise UserError(
            f"{path} has sha256 {digest}, {MANIFEST} expects {entry['sha256']}; "
            "the file was changed or the copy is incomplete"
        )
    tensors = read_file(path)
    numbers = sum(prod(tensor.shape) for tensor in tensors.values())
    if numbers != entry["parameters"]:
        raise UserError(
            f"{path} has {numbers:,} numbers, {MANIFEST} says {entry['parameters']:,} parameters; "
            "the two do not belong together"
        )
    fused = [stage for stage in manifest.stages if stage["fused"]]
    others = {name.partition(".")[0] for name in tensors} - {stage["name"] for stage in fused}
    if others:
        raise UserError(
            f"{path} has an aggregator for stage {min(others)}, which {MANIFEST} does not call fused; "
            "the two do not belong together"
        )
    hidden = entry["options"].get("hidden")
    for stage in fused:
        found = tensors.get(f"{stage['name']}.conv_in.weight")
        expected = (hidden, len(manifest.experts) * stage["channels"], 1, 1)
        if hidden is not None and (found is None or found.shape != expected):
            what = "missing" if found is None else f"of shape {list(found.shape)}"
            raise UserError(
                f"{path}: {stage['name']}.conv_in.weight is {what}, {MANIFEST} needs {list(expected)}; "
                "the two do not belong together"
            )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The aggregators' tensors, once they are checked. Raises UserError if they cannot be read."""
    tensors = load_tensors(folder / AGGREGATORS)
    broken = first_not_finite(tensors.items())
    if broken is not None:
        raise UserError(
            f"{folder / AGGREGATORS}: {broken} is not finite (NaN or infinite numbers); "
            "train the aggregators again"
        )
    return tensors


def fill(aggregators: nn.ModuleDict, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load tensors into the aggregators they were trained as.

    Raises UserError, naming the first that does not fit.
    """
    wanted = aggregators.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise UserError(
            f"{folder}: the aggregators {'lack' if name in wanted else 'have an unknown'} tensor {name}; "
            "they were made in another way"
        )
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            found, needed = list(tensors[name].shape), list(tensor.shape)
            raise UserError(
                f"{folder}: tensor {name} of the aggregators has shape {found}, the experts need {needed}; "
                "they belong to others"
            )
    aggregators.load_state_dict(dict(tensors))
