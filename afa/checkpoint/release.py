"""The format of the reference release: one folder aggregator_K per stage with config and weights."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypedDict

from safetensors.torch import save_file
from torch import Tensor, nn

from afa.aggregators.registry import Recipe
from afa.aggregators.sabw import SABW
from afa.errors import UserError
from afa.experts.headers import load_tensors, read_file
from afa.schema import Count, Within, build
from afa.stages.stage import Stage
from afa.text_files import read_json

RELEASE_DEPTH = 2  # whatever num_layers its config says, which a bug in the release ignores
LAYER = re.compile(r"transformer\.transformer_blocks\.(\d+)\.")


class Config(TypedDict):
    """The fields of an aggregator's config.json that are read.

    in_channels:    channels of the stage
    num_experts:    number of experts
    hidden_size:    channels inside the aggregator
    num_attn_heads: heads of its attention
    """

    in_channels: Count
    num_experts: Count
    hidden_size: Annotated[int, Within(1, 16384)]
    num_attn_heads: Annotated[int, Within(1, 1024)]


def is_release(folder: Path) -> bool:
    """Whether a folder holds aggregators as the reference release writes them."""
    return (folder / "aggregator_0" / "config.json").is_file()


def read_release(folder: Path, stages: tuple[Stage, ...], experts: int) -> tuple[Recipe, dict[str, Tensor]]:
    """Read the aggregators of a reference release.

    folder:  with one folder for each aggregator
    stages:  of the experts
    experts: their number
    Returns how the aggregators are made, and their tensors as "STAGE.name".
    Raises UserError if they do not fit the experts.
    """
    count = len([path for path in folder.iterdir() if path.name.startswith("aggregator_")])
    if count != len(stages):
        raise UserError(
            f"{folder} has {count} aggregators, the experts have {len(stages)} stages; "
            "they belong to another architecture"
        )
    configs: list[Config] = [
        build(Config, read_json(file), file)
        for index in range(count)
        for file in [folder / f"aggregator_{index}" / "config.json"]
    ]
    for stage, config in zip(stages, configs, strict=True):
        for name, expected in (("in_channels", stage.channels), ("num_experts", experts)):
            found = config[name]  # type: ignore[literal-required]
            if found != expected:
                raise UserError(
                    f"{folder}: the aggregator of {stage.name} has {name} {found}, the experts need"
                    f" {expected}"
                )
    tensors: dict[str, Tensor] = {}
    for index, stage in enumerate(stages):
        file = folder / f"aggregator_{index}" / "aggregator.safetensors"
        entries = read_file(file)
        hidden = entries["conv_in.weight"].shape[:1] if "conv_in.weight" in entries else ()
        if hidden != (configs[0]["hidden_size"],):
            raise UserError(
                f"{file}: conv_in.weight has {list(hidden)} channels, "
                f"its config says hidden_size {configs[0]['hidden_size']}"
            )
        tensors |= {f"{stage.name}.{name}": tensor for name, tensor in load_tensors(file).items()}
    options: dict[str, Any] = {"hidden": configs[0]["hidden_size"], "heads": configs[0]["num_attn_heads"]}
    # From the tensors, not from num_layers of the config, which the release ignores.
    options["depth"] = 1 + max(
        (int(found[1]) for name in tensors if (found := LAYER.search(name))), default=-1
    )
    return Recipe("sabw", options), tensors


def write_release(
    folder: Path,
    aggregators: nn.ModuleDict,
    stages: tuple[Stage, ...],
    recipe: Recipe,
    widths: tuple[int, int],
    experts: int,
) -> None:
    """Write aggregators in the format of the reference release.

    folder:  exists already
    recipe:  how the aggregators are made
    widths:  of the time embedding and of the text states
    experts: their number
    Raises UserError if the format cannot hold them.
    """
    everywhere = recipe.attention_up_to is None or all(
        isinstance(aggregator, SABW) and aggregator.transformer is not None
        for aggregator in aggregators.values()
    )
    if list(aggregators) != [stage.name for stage in stages] or recipe.kind != "sabw" or not everywhere:
        raise UserError(
            "the reference release knows only sabw with attention at every stage (placement layers); "
            "this ensemble is another"
        )
    for index, stage in enumerate(stages):
        aggregator = aggregators[stage.name]
        assert isinstance(aggregator, SABW)
        depth = 0 if aggregator.transformer is None else len(aggregator.transformer.transformer_blocks)
        if aggregator.transformer is None or depth != RELEASE_DEPTH:
            raise UserError(
                f"the reference release always builds aggregators of depth {RELEASE_DEPTH}; "
                f"it could not read these, of depth {depth}"
            )
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
        save_file(
            {name: tensor.contiguous() for name, tensor in aggregator.state_dict().items()},
            target / "aggregator.safetensors",
        )
