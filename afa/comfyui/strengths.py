"""Strengths of experts in ComfyUI: factors of their weights, in a part of the picture and of the steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from afa.errors import UserError

Active = tuple["Strength", ...]


@dataclass(frozen=True, eq=False)
class Strength:
    """One AFA Strength.

    expert: its place in the ensemble, from 0
    factor: of its weights, at least 0 (off); 1 changes nothing
    mask:   (B, H, W) from 0 to 1, where the factor holds; None: everywhere
    start, end: shares of the steps, as ComfyUI counts them, in which it holds
    """

    expert: int
    factor: float
    mask: Tensor | None = None
    start: float = 0.0
    end: float = 1.0


def factor_maps(active: Active, experts: int, size: tuple[int, int]) -> Tensor:
    """Return the factors of all experts on a stage's map: (B or 1, N, H, W), float32 on the CPU.

    Raises UserError if all experts are off at a place, or if masks are of different numbers of pictures.
    """
    counts = {1} | {len(one.mask) for one in active if one.mask is not None}
    if len(counts) > 2:
        raise UserError(
            f"masks of {', '.join(map(str, sorted(counts - {1})))} pictures; give one mask, or one each"
        )
    factors = torch.ones(max(counts), experts, *size)
    for one in active:
        inside = 1.0
        if one.mask is not None:
            inside = functional.interpolate(one.mask.float().cpu()[:, None], size, mode="area")[:, 0].clamp(
                0, 1
            )
        factors[:, one.expert] *= 1 + (one.factor - 1) * inside
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
