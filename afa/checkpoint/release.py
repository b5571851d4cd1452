"""The reference release's form: one folder aggregator_K per stage, with config.json and aggregator.safetensors."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from afa.aggregators.sabw import SABW
from afa.aggregators.table import Recipe
from afa.errors import UserError
from afa.experts.folders import read_object
from afa.experts.headers import load_tensors
from afa.families.stage import Stage

OPTIONS = {"hidden_size": "hidden", "num_attn_heads": "heads"}  # their word -> ours
RELEASE_DEPTH = 2  # whatever num_layers its config says: a shadowed variable
LAYER = re.compile(r"transformer\.transformer_blocks\.(\d+)\.")


def is_release(folder: Path) -> bool:
    """Whether a folder holds aggregators as the reference release writes them."""
    return (folder / "aggregator_0" / "config.json").is_file()


def read_release(folder: Path, stages: tuple[Stage, ...], experts: int) -> tuple[Recipe, dict[str, Tensor]]:
    """-> how such aggregators are made, and their tensors as "STAGE.name". Raises UserError if they do not fit."""
    count = len([path for path in folder.iterdir() if path.name.startswith("aggregator_")])
    if count != len(stages):
        raise UserError(f"{folder} has {count} aggregators, the experts have {len(stages)} stages; they belong to another architecture")
    configs = [read_object(folder / f"aggregator_{index}" / "config.json") for index in range(count)]
    for stage, config in zip(stages, configs, strict=True):
        for name, expected in (("in_channels", stage.channels), ("num_experts", experts)):
            if config.get(name) != expected:
                raise UserError(f"{folder}: the aggregator of {stage.name} has {name} {config.get(name)!r:.40}, the experts need {expected}")
    tensors = {
        f"{stage.name}.{name}": tensor
        for index, stage in enumerate(stages)
        for name, tensor in load_tensors(folder / f"aggregator_{index}" / "aggregator.safetensors").items()
    }
    options = {ours: configs[0].get(theirs) for theirs, ours in OPTIONS.items()}
    for name, value in options.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{folder}: {name} of aggregator_0 is {value!r:.40}, expected a whole number from 1 up")
    # From the tensors, not from num_layers of the config, which the release ignores.
    options["depth"] = 1 + max((int(found[1]) for name in tensors if (found := LAYER.search(name))), default=-1)
    return Recipe("sabw", options), tensors


def write_release(folder: Path, aggregators: nn.ModuleDict, stages: tuple[Stage, ...], recipe: Recipe, widths: tuple[int, int], experts: int) -> None:
    """Write aggregators in that form. Raises UserError if the form cannot hold them."""
    if list(aggregators) != [stage.name for stage in stages] or recipe.kind != "sabw" or recipe.attention_up_to is not None:
        raise UserError("the reference release knows only sabw with attention at every stage (placement layers); this ensemble is another")
    for index, stage in enumerate(stages):
        aggregator = aggregators[stage.name]
        assert isinstance(aggregator, SABW)
        depth = 0 if aggregator.transformer is None else len(aggregator.transformer.transformer_blocks)
        if aggregator.transformer is None or depth != RELEASE_DEPTH:
            raise UserError(f"the reference release always builds aggregators of depth {RELEASE_DEPTH}; it could not read these, of depth {depth}")
        config: dict[str, Any] = {
            "in_channels": stage.channels,
            "hidden_size": aggregator.conv_in.out_channels,
            "num_experts": experts,
            "num_layers": depth,
            "num_attn_heads": aggregator.transformer.config.num_attention_heads,
            "cross_attn_dim": widths[1],
            "temb_channels": widths[0],
        }
        target = folder / f"aggregator_{index}"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in aggregator.state_dict().items()}, target / "aggregator.safetensors")
