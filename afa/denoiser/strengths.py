"""Strengths of experts: factors of their weights, in a part of the picture and in a part of the steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from afa.errors import UserError, unknown
from afa.settings import WEIGHT, check_interval, check_number

Active = tuple["Strength", ...]
FAINTEST = 1e-6  # smallest strength above 0


@dataclass(frozen=True, eq=False)
class Strength:
    """One strength (AFA Strength in ComfyUI).

    expert: its name
    factor: of its weights, at least 0 (off); 1 changes nothing
    mask:   (B, H, W) from 0 to 1, where the factor holds; None: everywhere
    start, end: shares of the steps, 0 to 1, between which it holds; the last step is included in 1
    """

    expert: str
    factor: float
    mask: Tensor | None = None
    start: float = 0.0
    end: float = 1.0

    def holds(self, share: float) -> bool:
        """Return whether it holds in a step. share: of the steps that are done before it"""
        return self.start <= share < self.end


def check_regions(names: Sequence[str], regions: Sequence[Strength]) -> None:
    """Check strengths of the experts `names` that hold in parts of the picture and of the steps.

    Raises UserError for an unknown expert, a factor, mask or interval out of bounds, and if all experts are
    off at the same place and step.
    """
    for one in regions:
        if one.expert not in names:
            raise UserError(unknown(one.expert, names, "expert"))
        check_number(one.factor, f"the strength of expert '{one.expert}' is", **WEIGHT)
        check_interval((one.start, one.end), f"the steps of expert '{one.expert}'")
        _check_mask(one)
    for start in sorted({one.start for one in regions}):
        factors = _finest(tuple(one for one in regions if one.holds(start)), names)
        above = factors[factors > 0]
        if float(above.min()) < FAINTEST or float(above.max()) > WEIGHT["most"]:
            raise UserError(
                f"strengths multiply to {float(above.min()):.3g} and {float(above.max()):.3g} at a place of "
                f"the picture; they may be 0, or from {FAINTEST:g} to {WEIGHT['most']:g}"
            )


def _check_mask(one: Strength) -> None:
    if one.mask is None:
        return
    if one.mask.ndim != 3 or one.mask.numel() == 0:
        raise UserError(
            f"the mask of expert '{one.expert}' has shape {tuple(one.mask.shape)}; "
            "give (pictures, height, width)"
        )
    least, most = float(one.mask.min()), float(one.mask.max())  # nan is neither above nor below
    if not (least >= 0 and most <= 1):
        raise UserError(
            f"the mask of expert '{one.expert}' has values from {least:g} to {most:g}; give 0 to 1"
        )


def _finest(active: Active, names: Sequence[str]) -> Tensor:
    """Return the factors on a map as fine as the finest mask. Raises UserError as factor_maps does."""
    shapes = [one.mask.shape for one in active if one.mask is not None]
    size = (max((shape[1] for shape in shapes), default=1), max((shape[2] for shape in shapes), default=1))
    return factor_maps(active, names, size)


def factor_maps(active: Active, names: Sequence[str], size: tuple[int, int]) -> Tensor:
    """Return the factors of all experts on a stage's map: (B or 1, N, H, W), float32 on the CPU.

    Raises UserError if all experts are off at a place, or if masks are of different numbers of pictures.
    """
    counts = {1} | {len(one.mask) for one in active if one.mask is not None}
    if len(counts) > 2:
        raise UserError(
            f"masks of {', '.join(map(str, sorted(counts - {1})))} pictures; give one mask, or one each"
        )
    factors = torch.ones(max(counts), len(names), *size)
    for one in active:
        inside: Any = 1.0
        if one.mask is not None:
            inside = functional.interpolate(one.mask.float().cpu()[:, None], size, mode="area")[:, 0].clamp(
                0, 1
            )
        factors[:, names.index(one.expert)] *= 1 + (one.factor - 1) * inside
    if (factors.sum(1) == 0).any():
        raise UserError("all experts are off at a place of the picture; give at least one a strength above 0")
    return factors


def for_rows(factors: Tensor, images: int, passes: int, rows: int) -> Tensor:
    """Repeat factors for the rows of weights of a batch.

    factors: (B or 1, N, H, W)
    images:  B of the latents
    passes:  number of prompts in the batch, which lie one after another
    rows:    of the weights: one a picture and prompt, or N (where each expert has a blend of its own)
    """
    if len(factors) == 1:
        return factors
    if len(factors) != images:
        raise UserError(
            f"the mask is for {len(factors)} pictures, {images} are sampled; give one mask, or one each"
        )
    return factors.repeat_interleave(rows // (images * passes), 0).repeat(passes, 1, 1, 1)


def changes(active: Sequence[Strength]) -> bool:
    """Whether any strength changes anything."""
    return any(one.factor != 1 for one in active)


def rescaled(weights: Tensor, factors: Tensor) -> Tensor:
    """Multiply weights by factors, and divide them by their sum.

    weights: (R, N, H, W) convex over N
    factors: (1, N, 1, 1), or a map (1 or R, N, H, W); at least 0, and above 0 for an expert at every place
    Returns (R, N, H, W), convex over N. Where only experts that are off have weight, the others get shares by
    their factors. Where all factors are equal, weights keep their bits: a softmax sums to one only up to
    rounding, so dividing would change them.
    """
    changed = weights * factors
    total = changed.sum(1, keepdim=True)
    least = torch.finfo(total.dtype).tiny  # what is smaller is no sum to divide by: it has few digits left
    shares = factors / factors.sum(1, keepdim=True)
    divided = torch.where(total >= least, changed / total.clamp_min(least), shares)
    return torch.where((factors == factors[:, :1]).all(1, keepdim=True), weights, divided)
