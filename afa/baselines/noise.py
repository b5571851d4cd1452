"""What a prediction says about the noise, whatever its type."""

import math

import torch
from torch import Tensor

from afa.errors import UserError
from afa.lookup import unknown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def as_noise(prediction: Tensor, noisy: Tensor, alpha: float, kind: str) -> Tensor:
    """ε of a prediction for noisy = √ᾱ x₀ + √(1-ᾱ) ε. alpha: ᾱ, in (0, 1). Shapes are kept.

    v = √ᾱ ε - √(1-ᾱ) x₀ (Salimans and Ho, arXiv:2202.00512, appendix D), so ε = √ᾱ v + √(1-ᾱ) noisy.
    """
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if kind == "epsilon":
        return prediction
    if kind == "v_prediction":
        return signal * prediction + noise * noisy
    assert kind == "sample"
    return (noisy - signal * prediction) / noise


def check_kind(kind: str) -> str:
    """The prediction type, if it is one that says what the noise is. Raises UserError."""
    if kind not in PREDICTION_TYPES:
        raise UserError(unknown(kind, PREDICTION_TYPES, "known prediction_type"))
    return kind


def alpha_at(alphas: Tensor, timestep: float) -> float:
    """ᾱ at a timestep, linear between whole ones: alphas (T,)."""
    place = min(max(timestep, 0.0), len(alphas) - 1.0)
    low = math.floor(place)
    high = min(low + 1, len(alphas) - 1)
    return float(torch.lerp(alphas[low].double(), alphas[high].double(), place - low))
