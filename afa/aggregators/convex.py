"""Aggregators without parameters: the mean, and weights fixed by hand."""

import math

import torch
from torch import Tensor

from afa.aggregators.base import Aggregator


class Fixed(Aggregator):
    """The same convex weight for an expert everywhere, at every stage and step.

    weights: one number per expert, not negative, with sum 1. Cost: one multiplication per feature.
    """

    weights: Tensor

    def __init__(self, *, experts: int, channels: int, time_width: int, text_width: int, weights: list[float]) -> None:
        super().__init__()
        if len(weights) != experts:
            raise ValueError(f"{len(weights)} weights for {experts} experts; give one weight per expert")
        if min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise ValueError(f"weights {list(weights)} (sum {sum(weights):g}) are not convex; they must be >= 0 with sum 1")
        # A constant of the configuration, not a state: it moves with the module but is not saved.
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def weigh(self, features: Tensor, temb: Tensor, text: Tensor, kept: Tensor | None = None) -> Tensor:
        batch, experts, _, height, width = features.shape
        return self.weights.view(1, experts, 1, 1).expand(batch, experts, height, width)


class Mean(Fixed):
    """Every expert weighs the same: what an untrained SABW computes, without its cost."""

    def __init__(self, *, experts: int, channels: int, time_width: int, text_width: int) -> None:
        weights = [1 / experts] * experts
        super().__init__(experts=experts, channels=channels, time_width=time_width, text_width=text_width, weights=weights)
