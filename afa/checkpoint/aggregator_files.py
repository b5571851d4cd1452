"""The files of trained aggregators: read, checked against their manifest, and loaded.

An ensemble has one file beside its manifest; the reference release has a folder for each aggregator.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path

from torch import Tensor, nn

from afa.aggregators.registry import Recipe
from afa.checkpoint.manifest import AGGREGATORS, MANIFEST, Manifest, read_manifest, recipe_of
from afa.checkpoint.release import is_release, read_release
from afa.errors import UserError
from afa.experts.expert import Expert
from afa.experts.headers import first_not_finite, load_tensors, read_file
from afa.files import settled, sha256
from afa.models.registry import FAMILIES


def read_aggregators(
    folder: Path, expert: Expert, experts: int
) -> tuple[Recipe, str | list[str], dict[str, Tensor]]:
    """Read trained aggregators, of an ensemble or of the reference release.

    folder:  of the ensemble or of the release
    expert:  any of the experts, whose stages decide
    experts: their number
    Returns how the aggregators are made, their placement, and their tensors.
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


def check_file(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if the aggregators' file is missing, broken, or does not match the manifest.

    Only its hash and its header are read: no memory is allocated for sizes that a stranger wrote.
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
    """The aggregators' tensors. Raises UserError if they cannot be read, or hold NaN or infinity."""
    tensors = load_tensors(folder / AGGREGATORS)
    broken = first_not_finite(tensors.items())
    if broken is not None:
        raise UserError(
            f"{folder / AGGREGATORS}: {broken} is not finite (NaN or infinite numbers); "
            "train the aggregators again"
        )
    return tensors


def fill(aggregators: nn.ModuleDict, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load trained tensors into aggregators.

    tensors: as "STAGE.name"
    folder:  that they are from, for messages
    Raises UserError with the first tensor that does not fit.
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
