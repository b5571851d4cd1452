"""Where the tensors of a transformer lie in a single file of its publisher's names, and in which form.

One table for reading and for writing, at any width; diffusers' converters of FLUX.1, Chroma and Lumina 2 know
the width of one model. It is held against them by tests/test_transformer_files.py.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.models.registry import family_of, layers_of
from afa.stages.transformer_tables import NORMS


@dataclass(frozen=True)
class Place:
    """A tensor's name in the original layout, and its form there.

    form: "same"; "conv" (a linear layer as 1×1 convolution); "transposed"; "swapped" (its halves the other
    way round); "flat" (six vectors behind each other)
    rows: first and last + 1 of a tensor that several of diffusers' share; None: it has one for itself
    """

    key: str
    form: str = "same"
    rows: tuple[int, int] | None = None


def names_by_key(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Which tensors make up each of a single file's: one, or several in the order of their rows."""
    found: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: places[name].rows or (0, 0)):
        found.setdefault(places[name].key, []).append(name)
    return found


def from_original(tensor: Tensor, place: Place) -> Tensor:
    """A tensor of a single file as diffusers has it."""
    if place.rows is not None:
        tensor = tensor[slice(*place.rows)]
    if place.form == "swapped":
        return torch.cat(tensor.chunk(2)[::-1])
    if place.form == "transposed":
        return tensor.T
    if place.form == "flat":
        return tensor.reshape(6, -1)
    return tensor.flatten(1) if place.form == "conv" else tensor


def to_original(tensors: Sequence[Tensor], form: str) -> Tensor:
    """The reverse; tensors that share one are joined in order."""
    tensor = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    if form == "swapped":
        return torch.cat(tensor.chunk(2)[::-1])
    if form == "transposed":
        return tensor.T.contiguous()
    if form == "flat":
        return tensor.flatten()
    return tensor[..., None, None] if form == "conv" else tensor


def shape_from_original(shape: Sequence[int], place: Place) -> tuple[int, ...]:
    """The shape that from_original will give."""
    return tuple(from_original(torch.empty(shape, device="meta"), place).shape)


def shape_to_original(shapes: Sequence[Sequence[int]], form: str) -> tuple[int, ...]:
    """The shape that to_original will give."""
    return tuple(to_original([torch.empty(shape, device="meta") for shape in shapes], form).shape)


def transformer_places(shapes: Mapping[str, Sequence[int]], model: Any) -> dict[str, Place]:
    """The place of every tensor of a transformer, without what stands before its names in a file.

    shapes: of all of its own tensors, by the names that diffusers has today
    model:  with or without numbers
    Raises ValueError for names that the publisher's layout has no place for.
    """
    places: dict[str, Place] = {}
    for original, layers in layers_of(model).items():
        for end in ("weight", "bias"):
            own = [f"{name}.{end}" for name in layers.names]
            if own[0] in places or not all(
                name in shapes for name in own
            ):  # names of other programs come last
                continue
            ends = list(itertools.accumulate(shapes[name][0] for name in own))
            for name, first, last in zip(own, [0, *ends], ends, strict=False):
                rows = (first, last) if len(own) > 1 else None
                places[name] = Place(f"{original}.{end}", "swapped" if layers.swapped else "same", rows)
    for name in shapes:
        for pattern, new in NORMS.get(family_of(model), []):
            if name not in places and (found := re.fullmatch(pattern, name)):
                own_key = found.expand(new)
                places[name] = Place(own_key, "flat" if own_key.endswith(".mod.lin") else "same")
        if name not in places:
            raise ValueError(f"the original layout has no place for {name}")
    return {name: places[name] for name in shapes}
