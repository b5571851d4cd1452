"""afa.json, the manifest: what an ensemble is made of, so that it can be found, checked and made again.

A manifest may come from a stranger: it is checked as a whole before anything of it is used.
"""

import importlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from afa.aggregators.registry import AGGREGATORS as KINDS
from afa.aggregators.registry import Recipe, check_options
from afa.errors import UserError, unknown
from afa.experts.locate import PARTS, Located, recorded_files
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.spec import HUB_ID, ExpertSpec, Lora
from afa.files import settled, sha256
from afa.models.registry import FAMILIES
from afa.places import check_name, located, public_place, spelled
from afa.schema import Count, Like, Score, Sha256, Within, build, hints_of, shown
from afa.text_files import read_json

FORMAT: Literal[1] = 1
MANIFEST = "afa.json"
AGGREGATORS = "aggregators.safetensors"
TEXT_ENCODERS = tuple(part for part in PARTS if part.startswith("text_encoder"))
FRAME = ("vae", "tokenizer", "scheduler", "frame", *TEXT_ENCODERS)
PLACE = Annotated[str, Within(1, 4096)]  # a path or a hub id
RECORDED_SETTINGS = "afa.training.settings"  # the module that declares the options of a training
# keys that a record of a training has besides held_out_loss
MEASURED = (
    "settings",
    "training_images",
    "steps",
    "best_step",
    "best_expert",
    "difference_to_best_expert",
)


class LoraEntry(TypedDict):
    """A LoRA of an expert.

    path:     relative to the manifest
    strength: 1: as trained
    """

    path: PLACE
    strength: Annotated[float, Within(-1000, 1000)]


class StageEntry(TypedDict):
    """One stage of the experts.

    name:     such as OUT11
    channels: of its features
    level:    how often its features are halved in size
    fused:    whether it has an aggregator
    """

    name: Annotated[str, Like("[A-Z]{1,8}[0-9]{0,4}", "a stage such as OUT11")]
    channels: Annotated[int, Within(1, 10**6)]
    level: Annotated[int, Within(0, 16)]
    fused: bool


class AggregatorEntry(TypedDict):
    """How the aggregators are made, and their file.

    kind:            sabw, stitch, …
    options:         of the kind
    attention_up_to: largest side, in latent pixels, of maps with attention; None: all maps
    text_stream:     own or fused
    shared_guidance: whether both predictions of guidance have the weights of the one with the prompt
    parameters:      number of their elements
    sha256:          of their file
    """

    kind: str
    options: dict[str, Any]
    attention_up_to: Annotated[int, Within(0, 10**6)] | None
    text_stream: NotRequired[Literal["own", "fused"]]
    shared_guidance: NotRequired[bool]
    parameters: Count
    sha256: Sha256


class Loss(TypedDict):
    """A loss with its 95 % interval [low, high], over n images."""

    value: Score
    low: Score
    high: Score
    n: NotRequired[Count]


class Losses(TypedDict):
    """Losses on the held-out images: of the trained ensemble, and of others by name."""

    trained: Loss


class Measurement(TypedDict, total=False):
    """One measurement during training. Metrics that watch it may add numbers."""

    step: Count
    training_loss: Score | None
    held_out_loss: Score
    objective: Score
    terms: dict[str, Score]


class TrainingRecord(TypedDict, total=False):
    """The settings and results of a training. Aggregators from elsewhere may have less, or other keys."""

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
    difference_to_untrained: Loss
    difference_to_untrained_mean: Loss  # the same, in earlier records
    difference_to_start: Loss
    weights_moved: Score | None
    chosen_by_afa: list[str]
    history: list[Measurement]
    left_out: dict[str, Count]


@dataclass
class ExpertEntry:
    """One expert of a manifest.

    name:            unique in the ensemble
    source:          a hub id, or a path relative to the manifest
    commit:          of a hub id, the full hash; None: a path
    config:          of a single file; None: detected
    loras:           LoRA files that are part of it
    files:           sha256 of every file that decides what the expert computes, by name
    prediction_type: of its scheduler; None: unknown
    """

    name: str
    source: PLACE
    commit: Annotated[str, Like("[0-9A-Za-z]{1,64}", "a commit's letters and digits")] | None = None
    config: PLACE | None = None
    loras: list[LoraEntry] = field(default_factory=list)
    files: dict[str, Sha256] = field(default_factory=dict)
    prediction_type: str | None = None

    def spec(self, folder: Path) -> ExpertSpec:
        """The spec by which this expert is found again. folder: of the ensemble."""
        path = folder / located(self.source)
        source = str(path) if self.commit is None or path.exists() else self.source
        loras = tuple(Lora(str(folder / lora["path"]), lora["strength"]) for lora in self.loras)
        return ExpertSpec(self.name, source, self.commit, loras, str(folder / MANIFEST))

    def config_in(self, folder: Path) -> str | None:
        """The config of a single file, as load_expert takes it. folder: of the ensemble."""
        known = self.config is None or self.config in KNOWN_CONFIGS
        return self.config if known else str(folder / str(self.config))


@dataclass
class Manifest:
    """The content of afa.json.

    family:      of the experts
    experts:     in order
    frame:       the VAE, tokenizer and scheduler of the ensemble, and the frame and the files that give text
                 encoders to denoisers alone if there are any: part -> an expert's name, a path, or of a
                 frame a hub id with its commit
    placement:   a name, or a list of stages
    stages:      all of the experts' stages, in order
    aggregator:  how the aggregators are made, and their file
    training:    None: not trained
    afa_version: that wrote it
    format:      of this file
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
    """Read an ensemble's manifest. Raises UserError if there is none, or with the key that is wrong."""
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
    """Raise UserError for parts of a manifest that do not fit each other."""
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
    """Raise UserError for a recorded training option with a value of another type.

    Options that this version does not know are not checked: a later version may have written them.
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
    """The entry of an expert that stays where it is.

    found:           its files
    folder:          of the ensemble
    files:           sha256 by name
    config:          of a single file; None: detected
    prediction_type: of its scheduler
    """
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


def public_record(record: TrainingRecord | None) -> TrainingRecord | None:
    """A training's record with names in place of this machine's folders."""
    if record is None or "settings" not in record:
        return record
    settings = {
        name: value if name.endswith("_column") else public_place(value)
        for name, value in record["settings"].items()
    }
    return {**record, "settings": settings}


def relative(path: Path, folder: Path) -> str:
    """A path relative to a folder, as it is written to a manifest."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def check_hashes(entry: ExpertEntry, located: Located) -> None:
    """Raise UserError, with the file and both hashes, if an expert differs from the recorded one."""
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
    strange = next((name for name in files if name not in entry.files), None) if entry.files else None
    if strange is not None:
        raise UserError(
            f"expert '{entry.name}' has changed: {located.path} is now loaded from {strange}, "
            "which the ensemble was not made with;"
            " take it away or train again"
        )


def frame_places(manifest: Manifest, folder: Path) -> dict[str, str]:
    """The parts of a manifest's frame: part -> an expert's name, a place as found from here, or a hub id.

    folder: of the ensemble
    Raises UserError for a part that is not there.
    """
    names = [entry.name for entry in manifest.experts]
    found = {}
    for part, choice in manifest.frame.items():
        if choice in names or is_pinned(choice, folder):
            found[part] = choice
        elif (folder / choice).exists():
            found[part] = str(folder / choice)
        else:
            raise UserError(
                f"{folder / MANIFEST}: frame.{part} is {shown(choice)}, "
                "neither the name of an expert nor a place that is there"
            )
    return found


def is_pinned(choice: str, folder: Path) -> bool:
    """Whether a part of a frame is a hub id with its commit, and no place as found from the ensemble."""
    source, at, commit = choice.rpartition("@")
    known = HUB_ID.fullmatch(source) is not None and ".." not in source
    pinned = bool(at) and known and re.fullmatch("[0-9a-f]{40,64}", commit) is not None
    return pinned and not (folder / choice).exists()


def recipe_of(manifest: Manifest) -> Recipe:
    """How the aggregators of a manifest are made."""
    entry = manifest.aggregator
    text_stream, shared = entry.get("text_stream", "own"), entry.get("shared_guidance", False)
    return Recipe(entry["kind"], entry["options"], entry["attention_up_to"], text_stream, shared)
