"""A LoRA of the difference between two checkpoints: the best one of its rank, layer by layer.

Source: Eckart and Young (1936): no other matrix of the rank is nearer to the difference than the one of its
largest singular values. What a LoRA cannot hold (biases, norms, embeddings) is counted as lost.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from afa.devices import choose_device
from afa.distillation.extract_settings import ExtractSettings
from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.expert import TEXT_ENCODERS
from afa.experts.headers import current_name
from afa.experts.lora_files import diffusers_tensors, save_kohya
from afa.experts.spec import ExpertSpec
from afa.files import locked, staged
from afa.merging.engine import model_spec
from afa.merging.keys import check_same_keys, check_values
from afa.merging.plan import check_output
from afa.merging.sources import FileSource, Reader, open_source
from afa.places import public_place
from afa.training.finetune import FILE
from afa.version import __version__

KEY = "afa.extract"  # of the header
INSIDE = "encoder.layers."  # the layers of a text encoder that programs expect in a LoRA


@dataclass
class Kept:
    """How much of the squared difference a LoRA keeps: sums over weights, by layer and in all."""

    total: float = 0.0
    kept: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)  # the share of each

    @property
    def share(self) -> float:
        """The share of the whole squared difference, 1 where there is none."""
        return self.kept / self.total if self.total else 1.0


def open_both(settings: ExtractSettings) -> tuple[FileSource, FileSource]:
    """Find both models.

    Raises UserError if they cannot be compared, weight by weight, or if the output is there already.
    """
    specs = [
        ExpertSpec.parse(place, prediction_type=settings.prediction_type)
        for place in (settings.tuned, settings.base)
    ]
    check_output(Path(settings.output), settings.single_file, specs)
    tuned, base = (open_source(spec, settings.config) for spec in specs)
    reasons = mismatches([base.expert, tuned.expert])
    if reasons:
        raise UserError("; ".join(reasons))
    mine, theirs = (
        {key: source.tensors[key].shape for key in _compared(source, settings)} for source in (base, tuned)
    )
    check_same_keys(mine, theirs, tuned.name, base.name)
    return tuned, base


def _compared(source: FileSource, settings: ExtractSettings) -> list[str]:
    """The weights that a LoRA is to change, and those beside them that it cannot."""
    parts = [source.denoiser, *(() if settings.denoiser_only else TEXT_ENCODERS)]
    return [
        key for key, stored in source.tensors.items() if key.partition(".")[0] in parts and stored.is_float
    ]


def layers_of_lora(source: FileSource) -> dict[str, nn.Module]:
    """The linear and convolution layers of a model that a LoRA can hold, by "part.layer"."""
    assert source.description is not None
    found = {}
    for part, model in source.description.parts.items():
        if part == source.denoiser or part in TEXT_ENCODERS:
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d) and (part == source.denoiser or INSIDE in name):
                    found[f"{part}.{current_name(name)}"] = module
    return found


def extract(settings: ExtractSettings, both: tuple[FileSource, FileSource] | None = None) -> dict[str, Any]:
    """Write the LoRA, and return what it keeps of the difference, ready for JSON.

    both: what open_both(settings) returned
    All or nothing is written. Raises UserError.
    """
    tuned, base = both or open_both(settings)
    layers, device = layers_of_lora(base), choose_device(settings.device)
    keys, kept = _compared(base, settings), Kept()
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    with locked(Path(settings.output), file=settings.single_file):
        with Reader() as reader, tqdm(keys, desc="extracting", unit="tensor", file=sys.stderr) as bar:
            for key in bar:
                layer, _, end = key.rpartition(".")
                mine, theirs = tuned.read(key, reader), base.read(key, reader)
                check_values(key, [mine, theirs], [tuned.name, base.name])
                delta = mine.to(device, torch.float32) - theirs.to(device, torch.float32)
                squared = float(delta.square().sum())
                kept.total += squared
                if not squared or end != "weight" or layer not in layers:
                    continue
                pair = nearest(delta, settings.rank)
                share = 1 - float((delta - product(pair)).square().sum()) / squared
                kept.kept += share * squared
                kept.layers[layer] = share
                part, _, name = layer.partition(".")
                factors.setdefault(part, {})[name] = (pair[0].cpu(), pair[1].cpu())
        _write(settings, base, factors, kept)
    return facts(settings, tuned, base, kept)


def nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the matrix of this rank that is nearest to a layer's difference.

    delta: (out, in) or (out, in, height, width) of a convolution
    Returns down (rank, in …) and up (out, rank …), with equal norms. The rank is at most the matrix's own.
    """
    out, inner = delta.shape[0], delta.shape[1:]
    rank = min(rank, out, prod(inner))
    left, values, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    scale = values[:rank].sqrt()
    down, up = scale[:, None] * right[:rank], left[:, :rank] * scale
    ones = (1,) * (len(inner) - 1)
    return down.reshape(rank, *inner), up.reshape(out, rank, *ones)


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return what two factors add to a layer's weight."""
    down, up = pair
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _write(
    settings: ExtractSettings,
    base: FileSource,
    factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    kept: Kept,
) -> None:
    if not factors:
        raise UserError(
            f"{settings.tuned} and {settings.base} differ in no layer that a LoRA holds; "
            "there is nothing to extract"
        )
    dtype = getattr(torch, settings.dtype)
    cast = {
        part: {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in own.items()}
        for part, own in factors.items()
    }
    for part, layers in cast.items():
        for name, pair in layers.items():
            if not all(bool(tensor.isfinite().all()) for tensor in pair):
                raise UserError(
                    f"the LoRA of {part}.{name} does not fit {settings.dtype}; give --dtype bfloat16"
                )
    text = {part: own for part, own in cast.items() if part != base.denoiser}
    own = cast.get(base.denoiser, {})
    title = f"LoRA of {public_place(settings.tuned)} on {public_place(settings.base)}"
    header = {"format": "pt", KEY: f"afa {__version__}, share of the difference {kept.share:.4f}"}
    header |= model_spec(base.expert, title)
    output = Path(settings.output)
    if settings.single_file:
        save_kohya(output, base.model, own, text, header)
        return
    with staged(output, last=FILE) as stage:
        save_file(diffusers_tensors(base.model, own, text), stage / FILE, metadata=header)


def facts(settings: ExtractSettings, tuned: FileSource, base: FileSource, kept: Kept) -> dict[str, Any]:
    """Return what was extracted, as plain data."""
    worst = sorted(kept.layers, key=lambda name: kept.layers[name])[:3]
    return {
        "tuned": tuned.place,
        "base": base.place,
        "rank": settings.rank,
        "layers": len(kept.layers),
        "share_of_the_difference": kept.share,
        "worst": {name: kept.layers[name] for name in worst},
        "output": settings.output,
    }
