"""Saliency-aware noise blending: to which expert does guidance matter most, pixel by pixel. Pure functions.

Source: Zhao et al., MagicFusion, ICCV 2023, arXiv:2303.13126, section 3 and the published program.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def saliency(conditional: Tensor, reference: Tensor, guidance: float) -> Tensor:
    """S = |s (c - u)|, smoothed, mean over channels: (B, N, C, H, W), reference the same or with N = 1 -> (B, N, H, W).

    Smoothed by a 4×4 mean with stride 1 and zero padding 1, then resized to H×W. The published program takes
    the general expert's u for all; with each expert's own it is the paper's formula.
    """
    strength = (guidance * (conditional - reference)).abs()
    pooled = F.avg_pool2d(strength.flatten(0, 1), kernel_size=4, stride=1, padding=1)
    smooth = F.interpolate(pooled, size=strength.shape[-2:], mode="bilinear", align_corners=False)
    return smooth.mean(1).unflatten(0, strength.shape[:2])


def winners(saliencies: Tensor, sharpness: Tensor) -> Tensor:
    """argmax over experts of P = softmax over positions of k S (equation 4): (B, N, H, W), (N,) -> (B, H, W) indices.

    Where experts are equal, the first wins.
    """
    scaled = sharpness.to(saliencies).view(1, -1, 1) * saliencies.flatten(2)
    return torch.softmax(scaled, dim=-1).view_as(saliencies).argmax(1)


def pick(predictions: Tensor, winner: Tensor) -> Tensor:
    """Every pixel from its winner: (B, N, C, H, W), (B, H, W) -> (B, C, H, W)."""
    index = winner[:, None, None].expand(-1, 1, *predictions.shape[2:])
    return predictions.gather(1, index).squeeze(1)
