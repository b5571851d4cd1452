"""Every family's tiny models, side by side, for the laws that all of them obey.

The U-Nets have nine stages: laws take as long as there are stages. Whole ones are for `test_identity.py`.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny import SDXL_SMALL, SMALL, inputs, sd_unet, sdxl_inputs, sdxl_unet
from tiny_chroma import chroma_inputs, chroma_transformer
from tiny_flux2 import flux2_inputs, flux2_transformer
from tiny_krea2 import krea2_inputs, krea2_transformer
from tiny_lumina2 import lumina2_inputs, lumina2_transformer
from tiny_qwen_image_21 import qwen_image_21_inputs, qwen_image_21_transformer
from tiny_transformers import (
    flux_inputs,
    flux_transformer,
    qwen_image_inputs,
    qwen_image_transformer,
    sd3_inputs,
    sd3_transformer,
)
from tiny_z_image import z_image_inputs, z_image_transformer

from afa.aggregators.registry import Recipe
from afa.denoiser.base import EnsembleDenoiser
from afa.models.chroma import ChromaEnsemble
from afa.models.flux import FluxEnsemble
from afa.models.flux2 import Flux2Ensemble
from afa.models.krea2 import Krea2Ensemble
from afa.models.lumina2 import Lumina2Ensemble
from afa.models.qwen_image import QwenImageEnsemble
from afa.models.qwen_image_21 import QwenImage21Ensemble
from afa.models.sd3 import SD3Ensemble
from afa.models.unet import UNetEnsemble
from afa.models.z_image import ZImageEnsemble

SMALL_SABW = Recipe("sabw", {"hidden": 16, "heads": 2, "depth": 1})  # for laws that make many and train none


@dataclass(frozen=True)
class Model:
    """make(seed): a denoiser. call(batch=, height=, width=): what a pipeline hands to it; sides are of the latents. ensemble: its drop-in.

    placements: all that make sense for it; chosen: some stages by name.
    """

    make: Callable[..., Any]
    call: Callable[..., dict[str, Any]]
    ensemble: type[EnsembleDenoiser]
    chosen: tuple[str, ...]
    placements: tuple[str, ...] = ("layers", "blocks", "every-2", "out")


MODELS: dict[str, Model] = {
    "sd": Model(functools.partial(sd_unet, **SMALL), inputs, UNetEnsemble, ("IN00", "IN02", "M00", "OUT01", "OUT03")),
    "sdxl": Model(functools.partial(sdxl_unet, **SDXL_SMALL), sdxl_inputs, UNetEnsemble, ("IN00", "IN02", "M00", "OUT01", "OUT03")),
    "sd3": Model(sd3_transformer, sd3_inputs, SD3Ensemble, ("J01", "OUT"), ("layers", "every-2", "out")),
    "flux": Model(flux_transformer, flux_inputs, FluxEnsemble, ("D01", "S00", "OUT"), ("layers", "double", "every-2", "out")),
    "flux2": Model(flux2_transformer, flux2_inputs, Flux2Ensemble, ("D01", "S00", "OUT"), ("layers", "double", "every-2", "out")),
    "qwen-image": Model(
        qwen_image_transformer,
        functools.partial(qwen_image_inputs, lengths=(7, 4)),
        QwenImageEnsemble,
        ("Q01", "Q02", "OUT"),
        ("layers", "every-2", "out"),
    ),
    "z-image": Model(
        functools.partial(z_image_transformer, n_layers=2),
        functools.partial(z_image_inputs, lengths=(7, 40)),
        ZImageEnsemble,
        ("N01", "Z00", "OUT"),
        ("layers", "every-2", "out"),
    ),
    "chroma": Model(
        chroma_transformer,
        functools.partial(chroma_inputs, lengths=(7, 4)),
        ChromaEnsemble,
        ("D01", "S00", "OUT"),
        ("layers", "double", "every-2", "out"),
    ),
    "qwen-image-2.1": Model(
        qwen_image_21_transformer,
        functools.partial(qwen_image_21_inputs, lengths=(7, 4)),
        QwenImage21Ensemble,
        ("Q01", "Q02", "OUT"),
        ("layers", "every-2", "out"),
    ),
    "krea2": Model(
        krea2_transformer,
        functools.partial(krea2_inputs, lengths=(7, 4), holes=True),
        Krea2Ensemble,
        ("K01", "K02", "OUT"),
        ("layers", "every-2", "out"),
    ),
    "lumina2": Model(
        functools.partial(lumina2_transformer, num_layers=2),
        functools.partial(lumina2_inputs, lengths=(7, 4)),
        Lumina2Ensemble,
        ("N01", "L00", "OUT"),
        ("layers", "every-2", "out"),
    ),
}
FUSED = [(name, placement) for name, model in MODELS.items() for placement in (*model.placements, model.chosen)]


def in_turns(names: Iterable[str], placements: Sequence[str]) -> list[tuple[str, str]]:
    """Every name at the first placement, and at one of the others in turns."""
    first, *others = placements
    return [(name, placement) for turn, name in enumerate(names) for placement in (first, others[turn % len(others)])]


def sample_of(output: Any) -> torch.Tensor:
    """The prediction of a denoiser as one tensor; Z-Image returns a list with a tensor for each image."""
    return torch.stack(output.sample) if isinstance(output.sample, list) else output.sample


def image_of(output: Any, call: dict[str, Any]) -> torch.Tensor:
    """The prediction of a stock model for the image; Qwen-Image 2.1 answers for the text before it, too."""
    found = sample_of(output)
    return found[:, -call["hidden_states"].shape[1] :] if found.ndim == 3 else found
