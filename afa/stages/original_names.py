"""The original names of a model's layers, as its publisher writes them.

LoRAs and single files made by other programs use these names.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afa.stages.stage import Stage, stage_of_names
from afa.stages.transformer_tables import BLOCKS, ENDS


@dataclass(frozen=True)
class Layers:
    """The layers of a diffusers model that correspond to one original layer.

    names:   diffusers' names, in the order of their rows in the original weight
    swapped: True if the two halves of the rows (scale and shift) have the other order in diffusers
    """

    names: tuple[str, ...]
    swapped: bool = False


def original_layers(model: Any, family: str, stages: Sequence[Stage]) -> dict[str, Layers]:
    """Map the original names of a denoiser's layers to diffusers' layers. Empty if both names are equal.

    Source: of U-Nets, the names in CompVis stable-diffusion and Stability-AI generative-models; of
    transformers, see transformer_tables.py.
    """
    if family == "unet":
        weights = [name for name in model.state_dict() if name.endswith(".weight") and ".lora_" not in name]
        weights = [name.replace(".base_layer.", ".") for name in weights]
        renamed = unet_names(weights, stage_of_names(weights, model, stages))
        return {
            new.removesuffix(".weight"): Layers((name.removesuffix(".weight"),))
            for name, new in renamed.items()
        }
    found = {}
    present = {name.removesuffix(".base_layer") for name, _ in model.named_modules()}
    for original, names in ENDS.get(family, {}).items():
        swapped = original == "final_layer.adaLN_modulation.1" and names == ("norm_out.linear",)
        found[original] = Layers(names, swapped)
    for diffusers, block, table in BLOCKS.get(family, ()):
        start = f"{diffusers}."
        count = len({name.removeprefix(start).split(".")[0] for name in present if name.startswith(start)})
        for index in range(count):
            for original, names in table.items():
                last = (
                    index == count - 1 and original == "context_block.adaLN_modulation.1"
                )  # of SD3: a norm of its own
                inside = tuple(f"{diffusers}.{index}.{name}" for name in names)
                found[f"{block}.{index}.{original}"] = Layers(inside, last)
    return {original: layers for original, layers in found.items() if present.issuperset(layers.names)}


# U-Nets, in LDM's layout
PLACE = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_names(names: Collection[str], stages: Mapping[str, str]) -> dict[str, str]:
    """Map the names of a U-Net's tensors in diffusers to their original names.

    names:  diffusers' names
    stages: name of a tensor -> name of its stage. INxx is input_blocks.xx and OUTxx is output_blocks.xx;
            in a block, a residual layer is 0, its attention 1, an upsampler comes last
    Raises ValueError for a name that the original layout does not have.
    """
    attended = {stages[name] for name in names if ".attentions." in name}
    return {name: unet_name(name, stages[name], stages[name] in attended) for name in names}


def unet_name(name: str, stage: str, attended: bool) -> str:
    """Return the original name of one tensor.

    name:     diffusers' name
    stage:    name of its stage
    attended: True if the stage has attention
    Raises ValueError for a name that the original layout does not have.
    """
    if name.startswith("mid_block."):
        _, kind, number, rest = name.split(".", 3)
        position = 2 * int(number) + (kind == "attentions")
        return f"middle_block.{position}.{_resnet(rest) if kind == 'resnets' else rest}"
    place = PLACE.match(name)
    if place is None:
        module, _, last = name.rpartition(".")
        if module not in UNET_ENDS:
            raise ValueError(f"the original layout has no place for {name}")
        return f"{UNET_ENDS[module]}.{last}"
    side, rest = "input" if stage.startswith("IN") else "output", name[place.end() :]
    inside = {
        "resnets": lambda: f"0.{_resnet(rest)}",
        "attentions": lambda: f"1.{rest}",
        "downsamplers": lambda: f"0.op.{rest.removeprefix('conv.')}",
        "upsamplers": lambda: f"{1 + attended}.{rest}",
    }
    return f"{side}_blocks.{int(stage.lstrip('INOUT'))}.{inside[place[3]]()}"


def _resnet(rest: str) -> str:
    first, _, last = rest.partition(".")
    return f"{RESNET[first]}.{last}"
