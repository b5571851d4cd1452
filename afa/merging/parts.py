"""The parameters of several models side by side: key by key, with the stage each belongs to."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.headers import RENAMED, is_finite, is_position_ids, tied
from afa.merging.stages import DENOISERS, key_stages

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
MERGED = (*DENOISERS, *TEXT_ENCODERS)  # parts of a pipeline that a merge is made of; the VAE only when asked for


Parts = Mapping[str, nn.Module]  # of a pipeline, by name: unet, text_encoder …


def today(name: str) -> str:
    """A tensor's name in diffusers' layout as the installed libraries have it, whichever version wrote it."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def denoiser_of(parts: Parts) -> nn.Module:
    """The denoiser among some parts."""
    return next(module for name, module in parts.items() if name in DENOISERS)


def check_same_keys(first: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]], name: str, expected: str) -> None:
    """Raises UserError, naming the first key that only one of two models has, or that has two shapes."""
    start = f"'{name}' cannot join '{expected}'"
    for one, two, how in ((first, other, "lacks"), (other, first, "has, besides what is expected,")):
        extra = [key for key in one if key not in two]
        if extra:
            raise UserError(
                f"{start}: it {how} {extra[0]}{f' and {len(extra) - 1} more' if extra[1:] else ''}; models must share one architecture"
            )
    for key, shape in first.items():
        if tuple(other[key]) != tuple(shape):
            shapes = f"shape {tuple(other[key])}, expected {tuple(shape)}"
            raise UserError(f"{start}: {key} has {shapes}; models must share one architecture")


def check_values(key: str, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises UserError, naming the key and the model, for what cannot be merged.

    That is NaN and infinity, whole numbers or switches that differ, and numbers of two kinds.
    """
    for tensor, name in zip(tensors, names, strict=False):
        if not is_finite(tensor):
            raise UserError(f"'{name}': {key} holds NaN or infinity, so it is broken; leave it out, or download or export it again")
    first = tensors[0]
    for tensor, name in zip(tensors[1:], names[1:], strict=False):
        start = f"'{name}' cannot join '{names[0]}'"
        if tensor.is_floating_point() != first.is_floating_point():
            raise UserError(f"{start}: {key} is of type {tensor.dtype}, expected {first.dtype}")
        if not first.is_floating_point() and not (tensor.shape == first.shape and bool((tensor.to(first.device) == first).all())):
            raise UserError(f"{start}: {key} holds other whole numbers, and these cannot be merged")


@dataclass(frozen=True)
class Slot:
    """One key: where its merged value goes, and what it is made from.

    same: whether all experts have equal tensors; same_base: and the base, too.
    """

    key: str
    stage: str
    target: Tensor
    tensors: tuple[Tensor, ...]
    base: Tensor | None
    same: bool
    same_base: bool


def slots(targets: Parts, experts: Sequence[Parts], names: Sequence[str], base: Parts | None) -> list[Slot]:
    """Line up the state of some modules, by part, with that of the same parts of all experts and of their base.

    names: of the experts, and of the base at the end. Raises UserError if they do not fit.
    """
    into = state(targets)
    states = [state(expert) for expert in (*experts, *([base] if base is not None else []))]
    shapes = [{key: tensor.shape for key, tensor in one.items()} for one in states]
    for one, name in zip(shapes[1:], names[1:], strict=False):
        check_same_keys(shapes[0], one, name, names[0])
    for key in into:
        check_values(key, [one[key] for one in states], names)
    stages = key_stages(into, denoiser_of(targets))
    return [_slot(key, stages[key], into[key], [one[key] for one in states], base is not None) for key in into]


def _slot(key: str, stage: str, target: Tensor, tensors: list[Tensor], based: bool) -> Slot:
    base = tensors.pop() if based else None
    same = all(equal(tensors[0], other) for other in tensors[1:])
    return Slot(key, stage, target, tuple(tensors), base, same, same and base is not None and equal(tensors[0], base))


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, wherever they lie."""
    if one.dtype != other.dtype:
        return False
    if one.is_floating_point() and one.element_size() == 1:  # float8 cannot be compared as it is
        one, other = one.float(), other.float()
    return torch.equal(one, other.to(one.device))


def state(parts: Parts) -> dict[str, Tensor]:
    """All parameters and buffers of some modules as "part.name", each once, without position ids.

    Raises UserError for weights that are not in memory.
    """
    found = {f"{part}.{today(name)}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    again = {f"{part}.{name}" for part, module in parts.items() for name in tied(module)}
    found = {key: tensor for key, tensor in found.items() if key not in again and not is_position_ids(key)}
    absent = next((key for key, tensor in found.items() if tensor.is_meta), None)
    if absent:
        raise UserError(f"{absent} is not in memory (offloaded, or without weights); merge before offloading is enabled")
    return found
