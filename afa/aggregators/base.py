"""What an aggregator is, and the two that are not trained: mean and fixed weights."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

Adjust = Callable[[Tensor], Tensor]  # weights (R, N, H, W), convex over N, to others of the same kind


class Aggregator(nn.Module, ABC):
    """Fuses the experts' features of one stage. A kind of aggregator says how they are weighed.

    own_blends: whether it hands every expert a blend of its own, so that its weights are N rows a sample
    at_output:  the kind that stands in its place at the last stage, where an ensemble must make one
                prediction; None: itself
    """

    own_blends: ClassVar[bool] = False
    at_output: ClassVar["type[Aggregator] | None"] = None

    @property
    def reads(self) -> bool:
        """Whether the weights depend on the text."""
        return False

    def cross_attentions(self) -> list[nn.Module]:
        """Return the diffusers `Attention` layers through which the text is read; none if there are none."""
        return []

    @abstractmethod
    def weigh(self, features: Tensor, temb: Tensor, text: Tensor, kept: Tensor | None = None) -> Tensor:
        """features (B, N, C, H, W), temb (B, E), text (B, T, D) -> weights (B, N, H, W), convex over N.

        kept (B, T) bool: which of the text is no padding, and may be looked at; None: all of it.
        """

    def forward(
        self,
        features: Tensor,
        temb: Tensor,
        text: Tensor,
        kept: Tensor | None = None,
        adjust: Adjust | None = None,
    ) -> tuple[Tensor | list[Tensor], Tensor]:
        """Blend the experts' features: -> fused (B, C, H, W) in the features' dtype, weights (B, N, H, W).

        An aggregator may hand every expert a blend of its own: then fused is a list, one for each (see
        stitch.py).
        adjust: changes the weights before anything is blended; it is shown R = B of them, or B·N where
                everyone has a blend of its own.
        Source: arXiv:2405.17082, section 3.2. Deviation: none.
        """
        weights = self.weigh(features, temb, text, kept)
        if adjust is not None:
            weights = adjust(weights)
        return blend(features, weights.to(features.dtype)), weights


def blend(features: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over experts, without a second copy of all features.

    (B, N, C, H, W) -> (B, C, H, W).
    """
    fused = features[:, 0] * weights[:, 0, None]
    for expert in range(1, features.shape[1]):
        fused = fused.addcmul(features[:, expert], weights[:, expert, None])
    return fused


class Fixed(Aggregator):
    """The same convex weight for an expert everywhere, at every stage and step.

    weights: one number per expert, not negative, with sum 1. Cost: one multiplication per feature.
    """

    weights: Tensor

    def __init__(
        self, *, experts: int, channels: int, time_width: int, text_width: int, weights: list[float]
    ) -> None:
        super().__init__()
        if len(weights) != experts:
            raise ValueError(f"{len(weights)} weights for {experts} experts; give one weight per expert")
        if min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise ValueError(
                f"weights {list(weights)} (sum {sum(weights):g}) are not convex; they must be >= 0 with sum 1"
            )
        # A constant of the configuration, not a state: it moves with the module but is not saved.
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def weigh(self, features: Tensor, temb: Tensor, text: Tensor, kept: Tensor | None = None) -> Tensor:
        batch, experts, _, height, width = features.shape
        return self.weights.view(1, experts, 1, 1).expand(batch, experts, height, width)


class Mean(Fixed):
    """Every expert weighs the same: what an untrained SABW computes, without its cost."""

    def __init__(self, *, experts: int, channels: int, time_width: int, text_width: int) -> None:
        weights = [1 / experts] * experts
        super().__init__(
            experts=experts, channels=channels, time_width=time_width, text_width=text_width, weights=weights
        )
