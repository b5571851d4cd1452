"""Cross-stitched SABW: every expert keeps its own path and takes from the others, at every pixel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from afa.aggregators.base import Adjust, blend
from afa.aggregators.sabw import SABW

KEPT = 4.0  # logit an untrained expert gives itself over each other: .965 of three, .948 of four


class Stitch(SABW):
    """SABW that gives every expert a convex blend of its own instead of one blend to all.

    The weights are a matrix per pixel: row j is the blend with which expert j continues. It starts near the
    identity, so an untrained ensemble is nearly the mean of the experts' *predictions*: experts whose
    features have drifted apart are not mixed before anything is learnt. With equal rows it is SABW, with the
    identity a router on the predictions; it can learn to be either, at every pixel. The arguments are
    SABW's; besides, `kept` (a scalar) is trained. At the last stage, where an ensemble makes one prediction,
    SABW replaces it.

    Ours; the idea of learning what parallel networks share is that of Misra et al., Cross-stitch networks,
    arXiv:1604.03539, there with one scalar per stage and channel.
    """

    own_blends = True
    at_output = SABW

    def __init__(self, *, experts: int, **options: Any) -> None:
        super().__init__(experts=experts, **options)
        self.conv_out = nn.Conv2d(self.conv_in.out_channels, experts * experts, 1, bias=False)
        nn.init.zeros_(self.conv_out.weight)
        self.kept = nn.Parameter(torch.tensor(KEPT))
        self.experts = experts

    def matrix(
        self, features: Sequence[Tensor], temb: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Return the weights to each expert (dim 1) from all experts (dim 2): (B, N, N, H, W)."""
        logits = self.logits(features, temb, text, text_mask).unflatten(1, (self.experts, self.experts))
        own = torch.eye(self.experts, device=logits.device, dtype=logits.dtype).view(
            1, self.experts, self.experts, 1, 1
        )
        return torch.softmax(logits + self.kept * own, dim=2)

    def weigh(
        self, features: Sequence[Tensor], temb: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Return the mean over the blends: how much of each expert all take together, (B, N, H, W)."""
        return self.matrix(features, temb, text, text_mask).mean(1)

    def forward(
        self,
        features: Sequence[Tensor],
        temb: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        adjust: Adjust | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Return N blends (B, C, H, W) in the features' dtype, and the mean weights (B, N, H, W)."""
        matrix = self.matrix(features, temb, text, text_mask)
        if adjust is not None:  # a sample's rows stand one after another
            matrix = adjust(matrix.flatten(0, 1)).unflatten(0, matrix.shape[:2])
        return [blend(features, rows) for rows in matrix.unbind(1)], matrix.mean(1)
