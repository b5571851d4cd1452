"""Trained aggregators from a folder: ours, or the reference release's."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from afa.aggregators.table import Recipe
from afa.checkpoint.manifest import AGGREGATORS, MANIFEST, Manifest, read_manifest
from afa.checkpoint.release import is_release, read_release
from afa.errors import UserError
from afa.experts.load import Expert
from afa.families.table import FAMILIES
from afa.files import sha256


def read_aggregators(folder: Path, expert: Expert, experts: int) -> tuple[Recipe, str | list[str], dict[str, Tensor]]:
    """-> recipe, placement and tensors of trained aggregators. Raises UserError if they do not fit the experts."""
    stages = FAMILIES[expert.family].stages(expert.model)
    if is_release(folder):
        recipe, tensors = read_release(folder, stages, experts)
        return recipe, "layers", tensors
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no aggregators: neither {MANIFEST} nor aggregator_0/config.json is there")
    manifest = read_manifest(folder)
    if len(manifest.experts) != experts:
        raise UserError(f"{folder} has aggregators for {len(manifest.experts)} experts, {experts} are given; they must be as many, in the same order")
    shapes = [(stage["name"], stage["channels"]) for stage in manifest.stages]
    if shapes != [(stage.name, stage.channels) for stage in stages]:
        raise UserError(f"{folder} has aggregators for other stages than the experts have; they belong to another architecture")
    return recipe_of(manifest), manifest.placement, read_tensors(folder, manifest)


def recipe_of(manifest: Manifest) -> Recipe:
    """How a manifest's aggregators are made."""
    entry = manifest.aggregator
    return Recipe(entry["kind"], entry["options"], entry["attention_up_to"], entry.get("text_stream", "own"))


def read_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The aggregators' tensors. Raises UserError if the file is missing, broken or not the one the manifest knows."""
    path = folder / AGGREGATORS
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: it has no {AGGREGATORS}")
    found, expected = sha256(path), manifest.aggregator["sha256"]
    if found != expected:
        raise UserError(f"{path} has sha256 {found}, {MANIFEST} expects {expected}; the file was changed or the copy is incomplete")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
