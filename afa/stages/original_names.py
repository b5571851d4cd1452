"""The original names of a model's layers, as its publisher writes them.

LoRAs and single files made by other programs use these names.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afa.stages.stage import Stage, stage_of_names


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

    Source: the names in CompVis stable-diffusion, Stability-AI generative-models and sd3.5,
    black-forest-labs flux and flux2, lodestone-rock flow (Chroma), and (qkv1, proj2 …) XLabs' LoRAs of FLUX.
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
        found[original] = Layers(names, original == "final_layer.adaLN_modulation.1")
    for diffusers, block, table in BLOCKS.get(family, ()):
        count = len({name.split(".")[1] for name in present if name.startswith(f"{diffusers}.")})
        for index in range(count):
            for original, names in table.items():
                last = (
                    index == count - 1 and original == "context_block.adaLN_modulation.1"
                )  # of SD3: a norm of its own
                inside = tuple(f"{diffusers}.{index}.{name}" for name in names)
                found[f"{block}.{index}.{original}"] = Layers(inside, last)
    return {original: layers for original, layers in found.items() if present.issuperset(layers.names)}


# FLUX.1, FLUX.2, Chroma and SD3: original name -> diffusers' names, in a block and outside
_QKV, _ADDED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
FLUX_DOUBLE = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "qkv1": _QKV,
    "qkv2": _ADDED,
    "proj1": ("attn.to_out.0",),
    "proj2": ("attn.to_add_out",),
}
FLUX_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "qkv": _QKV,
    "proj": ("proj_out",),
}
FLUX2_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
FLUX2_SINGLE: dict[str, tuple[str, ...]] = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
}
SD3_BLOCK = {
    "x_block.attn.qkv": _QKV,
    "x_block.attn2.qkv": tuple(name.replace("attn.", "attn2.") for name in _QKV),
    "context_block.attn.qkv": _ADDED,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
FLUX_BLOCKS = (
    ("transformer_blocks", "double_blocks", FLUX_DOUBLE),
    ("single_transformer_blocks", "single_blocks", FLUX_SINGLE),
)
BLOCKS = {
    "flux": FLUX_BLOCKS,
    "flux2": (
        ("transformer_blocks", "double_blocks", FLUX2_DOUBLE),
        ("single_transformer_blocks", "single_blocks", FLUX2_SINGLE),
    ),
    "chroma": FLUX_BLOCKS,  # without modulation: a name whose layers a model lacks is left out
    "sd3": (("transformer_blocks", "joint_blocks", SD3_BLOCK),),
}
_EMBEDDER = "time_text_embed.{}_embedder.linear_{}"
_NETWORK = "distilled_guidance_layer"
_FLUX_FIRST = {"txt_in": ("context_embedder",), "img_in": ("x_embedder",)}
_LAST = {"final_layer.adaLN_modulation.1": ("norm_out.linear",), "final_layer.linear": ("proj_out",)}
ENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        **{
            f"{old}_in.{layer}_layer": (_EMBEDDER.format(new, number),)
            for old, new in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        },
        **_FLUX_FIRST,
        **_LAST,
    },
    "chroma": {
        **{f"{_NETWORK}.{end}_proj": (f"{_NETWORK}.{end}_proj",) for end in ("in", "out")},
        **{
            f"{_NETWORK}.layers.{index}.{layer}_layer": (f"{_NETWORK}.layers.{index}.linear_{number}",)
            for index in range(5)
            for number, layer in ((1, "in"), (2, "out"))
        },
        **_FLUX_FIRST,
        **_LAST,
    },
    "flux2": {
        **{
            f"{old}_in.{layer}_layer": (f"time_guidance_embed.{new}_embedder.linear_{number}",)
            for old, new in (("time", "timestep"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        },
        **{
            f"{kind}.lin": (f"{kind}.linear",)
            for kind in (
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
                "single_stream_modulation",
            )
        },
        **_FLUX_FIRST,
        **_LAST,
    },
    "sd3": {
        **{
            f"{old}_embedder.mlp.{2 * number - 2}": (_EMBEDDER.format(new, number),)
            for old, new in (("t", "timestep"), ("y", "text"))
            for number in (1, 2)
        },
        "x_embedder.proj": ("pos_embed.proj",),
        **_LAST,
    },
}

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
