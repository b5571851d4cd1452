"""The table of merges, and one key's merge in the precision it needs."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError, look_up, unknown
from afa.experts.headers import is_finite
from afa.merging.differences import add_difference, dare, model_stock, task_arithmetic, ties
from afa.merging.rules import mbw, slerp, weighted
from afa.merging.stages import BASE
from afa.settings import SHARE, Bounds, check_number, shares

MERGES: dict[str, Callable[..., Tensor]] = {
    "weighted": weighted,
    "mbw": mbw,
    "add_difference": add_difference,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "model_stock": model_stock,
    "slerp": slerp,
}
PAIRS = ("add_difference", "slerp")  # of exactly two experts
GIVEN = ("base", "stage", "key", "note")  # what a rule is told about a key; all else are its options
WRITTEN = {"mbw": {"base_alpha": None}}  # options that say how weights are read, before a rule sees them
# Bounds of options that are numbers; all others must be finite.
RANGES: dict[str, Bounds] = {"density": {"above": 0, "most": 1}, "drop": {"least": 0, "below": 1}, "t": SHARE}


def find_merge(method: str) -> Callable[..., Tensor]:
    """A merge's rule by its name. Raises UserError with the nearest names."""
    try:
        return look_up(method, MERGES, "merge")
    except ValueError as error:
        raise UserError(str(error)) from None


def options_of(method: str) -> dict[str, Any]:
    """A merge's own options with their defaults; inspect.Parameter.empty for one that must be given."""
    parameters = inspect.signature(find_merge(method)).parameters.values()
    own = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in GIVEN}
    return {**own, **WRITTEN.get(method, {})}


def needs(method: str, given: str) -> bool:
    """Whether a merge asks for `base`, `stage` or `key`."""
    return given in inspect.signature(find_merge(method)).parameters


def check_merge(method: str, experts: int, base: bool, options: Mapping[str, Any]) -> None:
    """Refuse, in one sentence, what does not belong together. Raises UserError.

    experts: how many there are, the base not among them. base: whether one was given. options: the merge's own.
    """
    known = options_of(method)
    for name in options:
        if name not in known:
            raise UserError(
                f"{method}: {unknown(name, known, 'option')}" if known else f"{method} has no options, so it cannot take '{name}'"
            )
    if experts < 1:
        raise UserError("a merge needs at least one expert")
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in options:
            raise UserError(f"{method} needs {name}")
    if needs(method, "base") and not base:
        raise UserError(f"{method} adds what experts learnt to their base; give the model that they were tuned from as base (--base)")
    if base and not needs(method, "base"):
        raise UserError(f"{method} takes no base; leave it out, or give it as one of the experts")
    if method in PAIRS and experts != 2:
        raise UserError(
            f"{method} is of exactly 2 experts, and {experts} were given; for other numbers there are weighted and task_arithmetic"
        )
    _check_values(method, experts, options)


def _check_values(method: str, experts: int, options: Mapping[str, Any]) -> None:
    """Numbers must be in their ranges."""
    for name, value in options.items():
        if name == "weights" or value is None:
            continue
        check_number(value, f"{method}: {name}", **RANGES.get(name, {}))
    if method == "weighted" and options.get("weights") is not None:
        shares(options["weights"], experts)


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

    tensors, base: finite; whole numbers are the first expert's.
    key, stage: where it stands.
    dtype: of the result, default the first tensor's.
    note: is called by a rule that falls back to the base.
    Raises UserError for a result that is not finite, or does not fit the dtype.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    asked = inspect.signature(rule).parameters
    given = {"base": None if base is None else _fine(base, first), "stage": stage, "key": key, "note": note}
    given = {name: value for name, value in given.items() if name in asked}
    return cast(rule([_fine(tensor, first) for tensor in tensors], **given, **options), dtype or first.dtype, key)


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A tensor in another type of floating point. Raises UserError, naming the key, for one that does not fit it."""
    converted = tensor.to(dtype)
    saturated = dtype.itemsize == 1 and tensor.abs().max() > torch.finfo(dtype).max  # 8-bit types do not overflow
    if saturated or not is_finite(converted):
        if not is_finite(tensor):
            raise UserError(f"the merge makes NaN or infinity of {key}; take smaller options, or leave an expert out")
        largest, most = tensor.abs().max().item(), torch.finfo(dtype).max
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{key} does not fit {name}: its largest number is {largest:g}, and {name} ends at {most:g};"
            " write the merge with --dtype bfloat16 or float32 (in Python: load the models in it)"
        )
    return converted


def say_fallen_back(method: str, count: int, total: int) -> None:
    """Say on stderr how many tensors a merge left as the base has them, if any."""
    if count:
        why = "there the experts' differences from it do not agree"
        print(f"afa: {method}: {count} of {total} tensors are the base's; {why}", file=sys.stderr)


def _fine(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32)
