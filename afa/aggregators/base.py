"""What an aggregator is, and the two that are not trained: mean and fixed weights."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

Adjust = Callable[[Tensor], Tensor]  # weights (R, N, H, W), convex over N, to others of the same kind


class Aggregator(nn.Module, ABC):
    """Fuses the experts' features of one stage; a subclass defines how they are weighed.

    own_blends: whether each expert gets a blend of its own; then there are N rows of weights per sample
    at_output:  the class that replaces it at the last stage, where an ensemble makes one prediction; None:
                the same class
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
    def weigh(
        self, features: Sequence[Tensor], temb: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Return the experts' weights at every place, (B, N, H, W), convex over N, at least float32.

        features:  N × (B, C, H, W) of the experts; in their dtype an aggregator computes (see in_dtype)
        temb:      (B, E) time embedding
        text:      (B, T, D) text states
        text_mask: (B, T) bool, False for padding, which must not be read; None: there is no padding
        """

    def forward(
        self,
        features: Sequence[Tensor],
        temb: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        adjust: Adjust | None = None,
    ) -> tuple[Tensor | list[Tensor], Tensor]:
        """Blend the experts' features; arguments as of weigh().

        adjust: changes the weights (R, N, H, W) before anything is blended; R = B, or B·N if each expert has
                a blend of its own
        Returns the blend (B, C, H, W) in the features' dtype, or a list with a blend for each expert (see
        stitch.py), and the weights (B, N, H, W).
        Source: arXiv:2405.17082, section 3.2. Deviation: none.
        """
        weights = self.weigh(features, temb, text, text_mask)
        if adjust is not None:
            weights = adjust(weights)
        return blend(features, weights), weights


def blend(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum over experts, (B, C, H, W), in the features' dtype.

    features: N × (B, C, H, W)
    weights:  (B, N, H, W)
    """
    shares = weights.to(features[0].dtype)
    fused = features[0] * shares[:, 0, None]
    for expert, own in enumerate(features[1:], start=1):
        fused = fused.addcmul(own, shares[:, expert, None])
    return fused


def in_dtype(module: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """Return what calls a module with its weights in a dtype: the module itself if they are in it already.

    Weights that are trained stay in float32, and get their gradients in float32, beside experts of half
    precision, in which everything else is computed: on a GPU that is twice as fast.
    """
    weights = dict(module.named_parameters())
    if all(weight.dtype == dtype for weight in weights.values()):
        return module
    cast = {name: weight.to(dtype) for name, weight in weights.items()}
    return lambda *args, **kwargs: functional_call(module, cast, args, kwargs)


class Fixed(Aggregator):
    """Gives each expert the same weight everywhere, at every stage and step.

    weights: one number per expert, not negative, with sum 1
    Cost: one multiplication per feature.
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

    def weigh(
        self, features: Sequence[Tensor], temb: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        batch, _, height, width = features[0].shape
        return self.weights.view(1, -1, 1, 1).expand(batch, -1, height, width)


class Mean(Fixed):
    """Gives all experts the same weight: what an untrained SABW computes, without its cost."""

    def __init__(self, *, experts: int, channels: int, time_width: int, text_width: int) -> None:
        weights = [1 / experts] * experts
        super().__init__(
            experts=experts, channels=channels, time_width=time_width, text_width=text_width, weights=weights
        )
