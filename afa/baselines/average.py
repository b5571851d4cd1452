"""Means: of the experts' predictions, and of their features (the untrained ensemble)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from afa.baselines.combination import Combination, Predict
from afa.baselines.options import FeatureMean, NoiseAverage
from afa.baselines.sampler import PipelineSampler, in_frame, settled
from afa.denoiser.base import EnsembleDenoiser
from afa.ensemble import Ensemble
from afa.options import shares


def average(predictions: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ pᵢ with Σ wᵢ = 1: predictions (B, N, C, H, W), weights (N,) or (B, N) -> (B, C, H, W).

    Summed as p₀ + Σ wᵢ (pᵢ - p₀), so that equal predictions stay what they are, bit for bit.
    """
    first = predictions[:, 0]
    total = first
    for expert in range(1, predictions.shape[1]):
        share = weights[..., expert].to(predictions).reshape(-1, 1, 1, 1)
        total = total + share * (predictions[:, expert] - first)
    return total


class Averaged(Combination):
    """The weighted mean of predictions. weights: one per expert, with sum 1; experts of weight 0 are not run."""

    def __init__(self, denoiser: EnsembleDenoiser, weights: Sequence[float]) -> None:
        super().__init__(denoiser)
        self.weights = torch.tensor(weights)

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        run = [expert for expert, weight in enumerate(self.weights) if weight > 0]
        return average(torch.stack([predict(expert) for expert in run], dim=1), self.weights[run]), self.weights


def noise_average(ensemble: Ensemble, options: NoiseAverage) -> PipelineSampler:
    """ε = Σ wᵢ εᵢ, each expert with its own text encoders; for any kind of prediction, since all are linear in ε."""
    weights = shares(options.weights, len(ensemble.names))
    return PipelineSampler(in_frame(ensemble, Averaged(ensemble.denoiser, weights)))


def feature_mean(ensemble: Ensemble, options: FeatureMean) -> PipelineSampler:
    """What AFA is before training (arXiv:2405.17082): the features' mean at every stage."""
    return PipelineSampler(settled(ensemble.sharing("mean").pipeline(), ensemble.experts[0]))
