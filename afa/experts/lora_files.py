"""LoRA files as other programs read them: by diffusers' names, or by kohya's, with alpha."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from afa.errors import UserError
from afa.files import replacing
from afa.models.registry import FAMILIES, family_of, layers_of
from afa.stages.original_names import Layers

A, B = ".lora_A.weight", ".lora_B.weight"
DENOISER = "lora_unet_"  # of a denoiser's layers, of transformers too
SAME = {"sd3": ("context_embedder",)}  # layers whose publisher calls them as diffusers does
CLIP = "text_model."  # begins the names of a CLIP text encoder's layers in files, whatever the library has
Factors = Mapping[str, tuple[Tensor, Tensor]]  # layer -> down (rank, in …) and up (out, rank …)


def diffusers_tensors(
    model: Any, factors: Factors, text: Mapping[str, Factors] | None = None
) -> dict[str, Tensor]:
    """Return a LoRA by diffusers' names: unet.… or transformer.….lora_A.weight; alpha equals the rank.

    model: the denoiser
    text:  of text encoders, by their names in a pipeline
    """
    parts = {FAMILIES[family_of(model)].component: factors}
    parts |= {part: _in_files(own) for part, own in (text or {}).items()}
    return {
        f"{part}.{name}{end}": tensor.contiguous()
        for part, own in parts.items()
        for name, pair in own.items()
        for end, tensor in zip((A, B), pair, strict=True)
    }


def kohya_tensors(
    model: Any, factors: Factors, text: Mapping[str, Factors] | None = None
) -> dict[str, Tensor]:
    """Return a LoRA by kohya's names: lora_unet_….lora_down.weight, .lora_up.weight and .alpha.

    SDXL's layers and those of transformers have their publisher's names there, those of SD 1.x and 2.x
    diffusers'. Layers that are one in the publisher's model (queries, keys and values) become one.
    All layers have one alpha, whatever their ranks: diffusers takes the most frequent one for attention.
    model, text: as of diffusers_tensors
    Raises UserError for a layer that those files have no name for.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    left = dict(factors)
    for original, layers in _names(model).items():
        own = {name: left.pop(name) for name in layers.names if name in left}
        if own:
            pairs[DENOISER + original.replace(".", "_")] = _joined(model, layers, own)
    if left:
        raise UserError(
            f"a LoRA of {next(iter(left))} cannot be written for other programs, which have no name for it; "
            "give a folder as --output"
        )
    several = model.config.get("addition_embed_type") is not None or family_of(model) != "unet"
    for part, encoder in (text or {}).items():
        number = (part.removeprefix("text_encoder").strip("_") or "1") if several else ""
        for name, pair in _in_files(encoder).items():
            pairs[f"lora_te{number}_{name.replace('.', '_')}"] = pair
    found: dict[str, Tensor] = {}
    alpha = max((len(down) for down, _ in pairs.values()), default=1)
    for key, (down, up) in pairs.items():
        found[f"{key}.lora_down.weight"] = down.contiguous()
        found[f"{key}.lora_up.weight"] = (up * (len(down) / alpha)).contiguous()
        found[f"{key}.alpha"] = torch.tensor(float(alpha), dtype=down.dtype)
    return found


def save_kohya(
    output: Path,
    model: Any,
    factors: Factors,
    text: Mapping[str, Factors] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA by kohya's names. header: what it says besides its rank and alpha"""
    tensors = kohya_tensors(model, factors, text)
    alpha = next(f"{tensor.item():g}" for name, tensor in tensors.items() if name.endswith(".alpha"))
    numbers = {"ss_network_dim": alpha, "ss_network_alpha": alpha}
    with replacing(output) as file:
        save_file(tensors, file, metadata={**(header or {}), **numbers})


def factors_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors by layer of a denoiser's LoRA that has diffusers' names."""
    return {
        name.partition(".")[2].removesuffix(A): (down, tensors[name.removesuffix(A) + B])
        for name, down in tensors.items()
        if name.endswith(A)
    }


def _in_files(factors: Factors) -> Factors:
    return {name if name.startswith(CLIP) else CLIP + name: pair for name, pair in factors.items()}


def _names(model: Any) -> Mapping[str, Layers]:
    """Return the layers of a denoiser by the names in kohya's files."""
    originals = layers_of(model)
    if family_of(model) == "unet" and model.config.addition_embed_type is None:
        return {name: Layers((name,)) for layers in originals.values() for name in layers.names}
    return {**originals, **{name: Layers((name,)) for name in SAME.get(family_of(model), ())}}


def _joined(model: Any, layers: Layers, own: Factors) -> tuple[Tensor, Tensor]:
    """Join the LoRAs of layers that are one: their downs one below the other, their ups on a diagonal."""
    if len(layers.names) == 1:
        down, up = own[layers.names[0]]
        return down, torch.cat(up.chunk(2)[::-1]) if layers.swapped else up
    downs = [own[name][0] for name in layers.names if name in own]
    ups = [
        own[name][1] if name in own else downs[0].new_zeros(model.get_submodule(name).out_features, 0)
        for name in layers.names
    ]
    return torch.cat(downs), torch.block_diag(*ups)
