"""LoRA files as other programs read them: by diffusers' names, or by kohya's, with alpha."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.models.registry import FAMILIES, family_of, layers_of
from afa.stages.original_names import Layers

A, B = ".lora_A.weight", ".lora_B.weight"
PREFIX = "lora_unet_"  # of a denoiser's layers, of transformers too


def diffusers_tensors(model: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a LoRA by diffusers' names: unet.… or transformer.….lora_A.weight; alpha equals the rank.

    factors: (down, up) by layer: (rank, in …) and (out, rank …)
    """
    component = FAMILIES[family_of(model)].component
    return {
        f"{component}.{name}{end}": tensor.contiguous()
        for name, pair in factors.items()
        for end, tensor in zip((A, B), pair, strict=True)
    }


def kohya_tensors(model: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a LoRA by kohya's names: lora_unet_….lora_down.weight, .lora_up.weight and .alpha.

    SDXL's layers and those of transformers have their publisher's names there, those of SD 1.x and 2.x
    diffusers'. Layers that are one in the publisher's model (queries, keys and values) become one.
    Raises UserError for a layer that those files have no name for.
    """
    found: dict[str, Tensor] = {}
    left = dict(factors)
    for original, layers in _names(model).items():
        own = {name: left.pop(name) for name in layers.names if name in left}
        if own:
            if layers.swapped:
                raise UserError(
                    f"a LoRA of {original} cannot be written for other programs; give a folder as --output"
                )
            down, up = _joined(model, layers, own)
            key = PREFIX + original.replace(".", "_")
            found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"] = down, up
            found[f"{key}.alpha"] = torch.tensor(float(len(down)), dtype=down.dtype)
    if left:
        raise UserError(
            f"a LoRA of {next(iter(left))} cannot be written for other programs, which have no name for it; "
            "give a folder as --output"
        )
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _names(model: Any) -> Mapping[str, Layers]:
    """Return the layers of a model by the names in kohya's files."""
    originals = layers_of(model)
    if family_of(model) == "unet" and model.config.addition_embed_type is None:
        return {name: Layers((name,)) for layers in originals.values() for name in layers.names}
    return originals


def _joined(model: Any, layers: Layers, own: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the LoRAs of layers that are one: their downs one below the other, their ups on a diagonal."""
    if len(layers.names) == 1:
        return own[layers.names[0]]
    downs = [own[name][0] for name in layers.names if name in own]
    ups = [
        own[name][1] if name in own else downs[0].new_zeros(model.get_submodule(name).out_features, 0)
        for name in layers.names
    ]
    return torch.cat(downs), torch.block_diag(*ups)
