"""Trained aggregators from a folder: ours, or the reference release's."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

from torch import Tensor, nn

from afa.aggregators.table import Recipe
from afa.checkpoint.manifest import AGGREGATORS, MANIFEST, Manifest, read_manifest
from afa.checkpoint.release import is_release, read_release
from afa.errors import UserError
from afa.experts.finite import first_not_finite
from afa.experts.headers import load_tensors, read_file
from afa.experts.load import Expert
from afa.families.table import FAMILIES
from afa.files import settled, sha256


def read_aggregators(folder: Path, expert: Expert, experts: int) -> tuple[Recipe, str | list[str], dict[str, Tensor]]:
    """-> recipe, placement and tensors of trained aggregators. Raises UserError if they do not fit the experts."""
    stages = FAMILIES[expert.family].stages(expert.model)
    if is_release(settled(folder)):
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
    check_file(folder, manifest)
    return recipe_of(manifest), manifest.placement, read_tensors(folder)


def recipe_of(manifest: Manifest) -> Recipe:
    """How a manifest's aggregators are made."""
    entry = manifest.aggregator
    return Recipe(entry["kind"], entry["options"], entry["attention_up_to"], entry.get("text_stream", "own"))


def check_file(folder: Path, manifest: Manifest) -> None:
    """Raises UserError if the aggregators' file is missing, broken, or not the one that the manifest describes.

    By hash and header: nothing has been allocated for sizes that a stranger wrote.
    """
    path, entry = folder / AGGREGATORS, manifest.aggregator
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: it has no {AGGREGATORS}")
    if (digest := sha256(path)) != entry["sha256"]:
        raise UserError(f"{path} has sha256 {digest}, {MANIFEST} expects {entry['sha256']}; the file was changed or the copy is incomplete")
    tensors = read_file(path)
    numbers = sum(prod(tensor.shape) for tensor in tensors.values())
    if numbers != entry["parameters"]:
        raise UserError(f"{path} has {numbers:,} numbers, {MANIFEST} says {entry['parameters']:,} parameters; the two do not belong together")
    fused = [stage for stage in manifest.stages if stage["fused"]]
    others = {name.partition(".")[0] for name in tensors} - {stage["name"] for stage in fused}
    if others:
        raise UserError(f"{path} has an aggregator for stage {min(others)}, which {MANIFEST} does not call fused; the two do not belong together")
    hidden = entry["options"].get("hidden")
    for stage in fused:
        found = tensors.get(f"{stage['name']}.conv_in.weight")
        expected = (hidden, len(manifest.experts) * stage["channels"], 1, 1)
        if hidden is not None and (found is None or found.shape != expected):
            what = "missing" if found is None else f"of shape {list(found.shape)}"
            raise UserError(f"{path}: {stage['name']}.conv_in.weight is {what}, {MANIFEST} needs {list(expected)}; the two do not belong together")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The aggregators' tensors, once they are checked. Raises UserError if they cannot be read."""
    tensors = load_tensors(folder / AGGREGATORS)
    broken = first_not_finite(tensors.items())
    if broken is not None:
        raise UserError(f"{folder / AGGREGATORS}: {broken} is not finite (NaN or infinite numbers); train the aggregators again")
    return tensors


def fill(aggregators: nn.ModuleDict, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load tensors into the aggregators they were trained as. Raises UserError, naming the first that does not fit."""
    wanted = aggregators.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise UserError(f"{folder}: the aggregators {'lack' if name in wanted else 'have an unknown'} tensor {name}; they were made in another way")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            found, needed = list(tensors[name].shape), list(tensor.shape)
            raise UserError(f"{folder}: tensor {name} of the aggregators has shape {found}, the experts need {needed}; they belong to others")
    aggregators.load_state_dict(dict(tensors))
