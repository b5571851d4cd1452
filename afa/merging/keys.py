"""One key of several models: its stage, whether its tensors fit, and its merge in the precision it needs."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.expert import TEXT_ENCODERS
from afa.experts.headers import is_finite
from afa.merging.rules import BASE, Merge, parameters_of
from afa.models.registry import FAMILIES, stages_of

DENOISERS = tuple(dict.fromkeys(family.component for family in FAMILIES.values()))  # what pipelines call them
MERGED = (*DENOISERS, *TEXT_ENCODERS)  # parts of a pipeline that are merged; the VAE only when asked for


def key_stages(keys: Iterable[str], denoiser: nn.Module) -> dict[str, str]:
    """The stage of every key "part.name" of a pipeline: of a denoiser's key by its family, else `base`.

    denoiser: the pipeline's
    Raises ValueError if no family reads it.
    """
    names = {key: key.partition(".")[2] for key in keys}
    own = {key: name for key, name in names.items() if key.partition(".")[0] in DENOISERS}
    stages = stages_of(own.values(), denoiser)
    return {key: stages[name] if key in own else BASE for key, name in names.items()}


def check_same_keys(
    first: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]], name: str, expected: str
) -> None:
    """Raises UserError, naming the first key that only one of two models has, or that has two shapes.

    first, other: key -> shape
    name:         of the other; expected: of the first
    """
    start, advice = f"'{name}' cannot join '{expected}'", "models must share one architecture"
    for one, two, how in ((first, other, "lacks"), (other, first, "has, besides what is expected,")):
        extra = [key for key in one if key not in two]
        if extra:
            more = f" and {len(extra) - 1} more" if extra[1:] else ""
            raise UserError(f"{start}: it {how} {extra[0]}{more}; {advice}")
    for key, shape in first.items():
        if tuple(other[key]) != tuple(shape):
            raise UserError(
                f"{start}: {key} has shape {tuple(other[key])}, expected {tuple(shape)}; {advice}"
            )


def check_values(key: str, tensors: Sequence[Tensor], owners: Sequence[str]) -> None:
    """Raises UserError, naming the key and the model, for what cannot be merged.

    That is NaN and infinity, whole numbers or switches that differ, and numbers of two kinds.
    """
    for tensor, name in zip(tensors, owners, strict=False):
        if not is_finite(tensor):
            advice = "so it is broken; leave it out, or download or export it again"
            raise UserError(f"'{name}': {key} holds NaN or infinity, {advice}")
    first = tensors[0]
    for tensor, name in zip(tensors[1:], owners[1:], strict=False):
        start = f"'{name}' cannot join '{owners[0]}'"
        if tensor.is_floating_point() != first.is_floating_point():
            raise UserError(f"{start}: {key} is of type {tensor.dtype}, expected {first.dtype}")
        same = first.is_floating_point() or tensor.shape == first.shape
        if not same or not (first.is_floating_point() or bool((tensor.to(first.device) == first).all())):
            raise UserError(f"{start}: {key} holds other whole numbers, and these cannot be merged")


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same type, wherever they lie."""
    if one.dtype != other.dtype:
        return False
    if one.is_floating_point() and one.element_size() == 1:  # float8 cannot be compared as it is
        one, other = one.float(), other.float()
    return torch.equal(one, other.to(one.device))


def merge_key(
    rule: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    key: str = "",
    stage: str = BASE,
    dtype: torch.dtype | None = None,
    note: Callable[[], None] | None = None,
    **options: Any,
) -> Tensor:
    """Apply a rule to one key, computed in float32 (float64 tensors in float64): -> the merged tensor.

    tensors, base: finite, all moved to the first one's device; whole numbers are the first expert's
    key, stage:    where it stands
    dtype:         of the result, default the first tensor's
    note:          is called by a rule that falls back to the base
    Raises UserError for a result that is not finite, or does not fit the dtype.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    given = {"base": None if base is None else _fine(base, first), "stage": stage, "key": key, "note": note}
    taken = {name: value for name, value in given.items() if name in parameters_of(rule)}
    merged = rule([_fine(tensor, first) for tensor in tensors], **taken, **options)
    return cast(merged, dtype or first.dtype, key)


def _fine(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A tensor in another type of floating point.

    Raises UserError, naming the key, for one that does not fit it.
    """
    converted = tensor.to(dtype)
    saturated = (
        dtype.itemsize == 1 and tensor.abs().max() > torch.finfo(dtype).max
    )  # 8-bit types do not overflow
    if saturated or not is_finite(converted):
        if not is_finite(tensor):
            raise UserError(
                f"the merge makes NaN or infinity of {key}; take smaller options, or leave an expert out"
            )
        largest, most = tensor.abs().max().item(), torch.finfo(dtype).max
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{key} does not fit {name}: its largest number is {largest:g}, and {name} ends at {most:g};"
            " write the merge with --dtype bfloat16 or float32 (in Python: load the models in it)"
        )
    return converted


@dataclass(kw_only=True)
class KeyMerge:
    """One merge, computed key by key: of files and in memory.

    merge, options: the method, and all that its rule takes
    stages:         of every key
    device:         where it is computed; None: where the first expert's tensor is
    fallen_back:    how many tensors the rule left as the base has them
    """

    merge: Merge
    options: Mapping[str, Any]
    stages: Mapping[str, str]
    device: torch.device | None = None
    fallen_back: int = 0

    @torch.no_grad()
    def compute(self, key: str, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """One key's merged value; where all models have the same tensor, that one.

        tensors: of the experts, and of the base if the merge needs one; checked by check_values
        dtype:   of the result; None: as exact as it is computed
        Raises UserError for a result that is not finite or does not fit.
        """
        first = tensors[0]
        if not first.is_floating_point():
            return first
        if all(equal(first, other) for other in tensors[1:]):
            return first if dtype in (None, first.dtype) else cast(first, dtype, key)
        moved = [tensor.to(self.device or first.device) for tensor in tensors]
        base = moved.pop() if self.merge.needs("base") else None
        exact = torch.float64 if any(one.dtype == torch.float64 for one in tensors) else torch.float32
        where: dict[str, Any] = {"key": key, "stage": self.stages[key], "note": self._note}
        merged = merge_key(self.merge.rule, moved, base, dtype=dtype or exact, **where, **self.options)
        return merged.to(first.device)

    def _note(self) -> None:
        self.fallen_back += 1

    def say_fallen_back(self, total: int) -> None:
        """Say on stderr how many of all tensors are left as the base has them, if any."""
        if self.fallen_back:
            count = f"{self.fallen_back} of {total} tensors are the base's"
            why = "there the experts' differences from it do not agree"
            print(f"afa: {self.merge.name}: {count}; {why}", file=sys.stderr)
