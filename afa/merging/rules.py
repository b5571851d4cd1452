"""The merges of plain weights: one key's tensors in, one tensor out. The table of all is in table.py.

A rule takes the experts' tensors of one key, in float32 or finer, and says by its keyword arguments what else it needs:
`base` (the same key of the model the experts come from), `stage` and `key` (where the tensors stand) come from whoever
walks the keys, all others are the rule's options.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from afa.settings import shares

OPPOSITE = 1e-12  # |â + b̂| below this is rounding in float64


def weighted(tensors: Sequence[Tensor], *, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean: θ = Σ wᵢ θᵢ with Σ wᵢ = 1.

    weights: one per expert, in any unit (2 1 1 means 0.5 0.25 0.25); default equal.
    An expert of weight 1 alone, and experts that are all equal, give that tensor bit for bit.
    Source: the weighted sum of sd-webui-supermerger; equal weights: Diffusion Soup, arXiv:2406.08431.
    """
    taking_part = [(tensor, share) for tensor, share in zip(tensors, shares(weights, len(tensors)), strict=True) if share]
    first = taking_part[0][0]
    merged = first
    for tensor, share in taking_part[1:]:  # as differences, so that equal tensors change nothing
        merged = torch.add(merged, tensor - first, alpha=share)
    return merged.clone() if merged is first else merged


def mbw(tensors: Sequence[Tensor], *, stage: str, weights: Mapping[str, Sequence[float]]) -> Tensor:
    """Block-weighted mean: weighted, with one set of weights per stage.

    weights: stage -> one per expert, for every stage and for `base` (all that is not the denoiser).
    Source: bbc-mc, sdweb-merge-block-weighted-gui. Deviation: more than two experts, each stage its own convex weights.
    """
    return weighted(tensors, weights=weights[stage])


def slerp(tensors: Sequence[Tensor], *, t: float = 0.5) -> Tensor:
    """Spherical interpolation of two tensors.

    t: from the first (0) to the second (1). The direction turns along the great circle, the norm changes linearly.
    Where there is no angle (equal directions) or no direction (a zero tensor, opposite ones) it is the straight line.
    Computed in float64, from the middle of the two directions: the angle is 2 atan2(|â - b̂|, |â + b̂|), whose digits are
    right next to parallel and opposite tensors too, where an arc cosine loses half of them.
    Source: Shoemake 1985, per tensor as the merging community does it (and sd-mecha).
    """
    one, other = tensors
    if torch.equal(one, other):
        return one.clone()
    a, b = one.double(), other.double()
    lengths = a.norm(), b.norm()
    a, b = a / lengths[0], b / lengths[1]
    apart, together = (a - b).norm(), (a + b).norm()
    if not (apart > 0 and together > OPPOSITE):  # a zero tensor makes both NaN
        return weighted([one, other], weights=[1 - t, t])
    turned = 2 * torch.atan2(apart, together) * (0.5 - t)  # from the middle
    direction = torch.cos(turned) * (a + b) / together + torch.sin(turned) * (a - b) / apart
    merged: Tensor = direction * torch.lerp(*lengths, t)
    return merged.to(one.dtype)
