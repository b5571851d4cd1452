"""The merges of differences dᵢ = θᵢ - base, the experts' task vectors. See rules.py for what a rule takes."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def add_difference(tensors: Sequence[Tensor], *, base: Tensor, alpha: float = 1.0) -> Tensor:
    """What the second expert learnt is added to the first: θ = A + alpha (B - base).

    alpha: how much of it; 1 is all.
    Source: AUTOMATIC1111's and supermerger's "add difference" (A, B, C).
    """
    first, second = tensors
    return torch.add(first, second - base, alpha=alpha)


def task_arithmetic(tensors: Sequence[Tensor], *, base: Tensor, scale: float = 0.4) -> Tensor:
    """What all experts learnt is added to their base: θ = base + λ Σ dᵢ.

    scale: λ; 0.4 is what arXiv:2306.01708 takes when it is not tuned; 1/N gives the mean of N experts.
    Source: Ilharco et al., arXiv:2212.04089.
    """
    return torch.add(base, sum_of(tensor - base for tensor in tensors), alpha=scale)


def ties(tensors: Sequence[Tensor], *, base: Tensor, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """Trim, elect a sign, average what agrees: θ = base + λ mean of the survivors.

    density: which fraction of a tensor's differences is kept, the largest |dᵢ|. The elected sign is that of the sum of
    what was kept; only differences of that sign are averaged. scale: λ.
    Source: Yadav et al., arXiv:2306.01708, Algorithm 1, per tensor. Deviation: the paper ranks a whole model's
    differences at once; the community, and streaming, tensor by tensor.
    """
    trimmed = torch.stack([_largest(tensor - base, density) for tensor in tensors])
    elected = torch.sign(trimmed.sum(0))
    agrees = (torch.sign(trimmed) == elected) & (trimmed != 0)
    mean = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return torch.add(base, mean, alpha=scale)


def dare(tensors: Sequence[Tensor], *, base: Tensor, key: str, drop: float = 0.5, seed: int = 0, scale: float = 0.4) -> Tensor:
    """Drop differences at random, rescale the others, then task arithmetic: θ = base + λ Σ mᵢ dᵢ / (1 - p).

    drop: p, in [0, 1). seed: every expert and every key has a mask of its own, fixed by seed, key and the expert's place.
    scale: λ, as in task_arithmetic.
    Source: Yu et al., arXiv:2311.03099.
    """
    masked = ((tensor - base) * _kept(base, drop, f"{seed}:{key}:{place}") for place, tensor in enumerate(tensors))
    return torch.add(base, sum_of(masked), alpha=scale / (1 - drop))


def model_stock(tensors: Sequence[Tensor], *, base: Tensor, note: Callable[[], None] | None = None) -> Tensor:
    """The mean of the experts, drawn back to their base the more they disagree: θ = base + t · mean dᵢ.

    t = N cos / (1 + (N - 1) cos), cos: the mean cosine of all pairs of dᵢ, per tensor, in float64. Equal differences
    give t = 1, unrelated ones 0. Differences that cancel out (cos below 0) give the base; then note is called. A single
    expert gives itself.
    Source: Jang et al., arXiv:2403.19522, equation for N fine-tuned models.
    """
    differences = [tensor - base for tensor in tensors]
    count = len(differences)
    flat = torch.stack([difference.flatten() for difference in differences]).double()
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cosines = flat @ flat.T
    pairs = count * (count - 1)
    cosine = ((cosines.sum() - cosines.trace()) / pairs).clamp(0, 1).item() if pairs else 1.0
    ratio = count * cosine / (1 + (count - 1) * cosine)
    if ratio == 0 and note is not None:
        note()
    return torch.add(base, sum_of(differences) / count, alpha=ratio)


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum, without a copy of every summand at once."""
    return functools.reduce(torch.add, tensors)


def _largest(difference: Tensor, density: float) -> Tensor:
    """Zero all but the given fraction of the largest magnitudes, at least one; equals at the limit stay together, NaN stays."""
    keep = max(1, round(density * difference.numel()))
    magnitude = difference.abs()
    limit = magnitude.flatten().kthvalue(difference.numel() - keep + 1).values
    return torch.where(magnitude < limit, torch.zeros_like(difference), difference)  # so that NaN stays


def _kept(like: Tensor, drop: float, name: str) -> Tensor:
    """A mask of ones with probability 1 - drop; the same for the same name on every machine and device."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(like.shape, generator=generator) >= drop).to(like.device, like.dtype)
