"""`sparsity`: a price on weights that are spread over many experts, so that experts and stages can be left out later."""

import math

import torch
from torch import Tensor

from afa.training.objectives.base import Objective, Pass


class Sparsity(Objective):
    """The mean over stages and places of the weights' entropy, from 0 (one expert) to 1 (all alike).

    top: instead, the share of the weight outside the `top` largest, from 0 to 1 - top / N.
    """

    needs_weights = True

    def __init__(self, top: int | None = None) -> None:
        self.top = top

    def loss(self, work: Pass) -> Tensor:
        return torch.stack([self._spread(weights.float()) for weights in work.weights.values()]).mean(0)

    def _spread(self, weights: Tensor) -> Tensor:
        """(B, N, H, W) -> (B,)."""
        if self.top is not None:
            return 1 - weights.topk(min(self.top, weights.shape[1]), dim=1).values.sum(1).mean((1, 2))
        # entr(0) has an infinite slope, and a softmax can reach 0
        return torch.special.entr(weights.clamp(min=1e-12)).sum(1).mean((1, 2)) / math.log(max(2, weights.shape[1]))
