"""Learnable head-room: what routing could gain over the best expert, judged by structure that survives a change of noise.

For an image and a timestep several noises are drawn; all experts predict on the same noisy latents. At every element the expert
that won (least squared error) most often on the *other* draws answers for a held-out draw. What only the noise decides
cancels, so a trained router could learn what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Routes:
    """Mean squared errors at one image and timestep, over all draws and elements.

    experts (N,). routed: every element answered by the winner of the other draws. routed_pixels: the same with one winner for all channels
    of a place, which is all that weight maps can express. mean: of the experts' predictions. sample_oracle, element_oracle: the best
    expert of a draw, of an element, chosen with the truth: upper bounds only. wins (N,): shares of the elements. agreement: how often the
    winners of two draws are the same.
    """

    experts: Array
    routed: float
    routed_pixels: float
    mean: float
    sample_oracle: float
    element_oracle: float
    wins: Array
    agreement: float


def routes(errors: Tensor) -> Routes:
    """errors (N, D, C, h, w): prediction minus target of N experts at D noises, the best expert first: ties go to it.

    Raises ValueError for fewer than two draws: none would be left to learn from.
    """
    if errors.shape[1] < 2:
        raise ValueError(f"head-room needs at least two draws of noise, got {errors.shape[1]}")
    squared = errors.square()
    elements = squared.flatten(2)  # (N, D, C·h·w)
    pixels = squared.mean(2).flatten(2)  # (N, D, h·w)
    winners = elements.argmin(0)
    counts = _counts(winners, len(errors))
    draws = errors.shape[1]
    agreement = (counts * (counts - 1)).sum(0).double().mean() / (draws * (draws - 1))
    return Routes(
        experts=elements.double().mean((1, 2)).numpy(),
        routed=_routed(elements, winners, counts),
        routed_pixels=routed(pixels),
        mean=float(errors.mean(0).square().double().mean()),
        sample_oracle=float(elements.double().mean(2).amin(0).mean()),
        element_oracle=float(elements.amin(0).double().mean()),
        wins=(counts.double().mean(1) / draws).numpy(),
        agreement=float(agreement),
    )


def routed(squared: Tensor) -> float:
    """Squared errors (N, D, E), the best expert first -> the mean where each element's winner of the other draws answers for a draw."""
    winners = squared.argmin(0)
    return _routed(squared, winners, _counts(winners, len(squared)))


def _routed(squared: Tensor, winners: Tensor, counts: Tensor) -> float:
    total = 0.0
    for draw, won in enumerate(winners):
        others = counts.clone()
        others[won, torch.arange(len(won))] -= 1
        total += float(squared[:, draw].gather(0, others.argmax(0)[None]).double().mean())
    return total / len(winners)


def _counts(winners: Tensor, experts: int) -> Tensor:
    """(D, E) -> how often each expert won each element, (N, E)."""
    return torch.stack([(winners == expert).sum(0) for expert in range(experts)])


def chance_agreement(wins: Array, weights: Sequence[float] | None = None) -> float:
    """How often two draws would agree if only win rates mattered: the sum of squared win rates. wins (images, N)."""
    rates = np.average(wins, axis=0, weights=weights)
    return float((rates**2).sum())
