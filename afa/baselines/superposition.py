"""Superposition of densities while sampling: the formulas of SuperDiff in sigma space. Pure functions.

Source: Skreta et al., The superposition of diffusion models using the Itô density estimator, arXiv:2412.17762. There
x = x₀ + sigma ε, a model's velocity is its ε, and a step goes from sigma to sigma + dsigma, with dsigma < 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from afa.baselines.average import average

ROUNDING = 1e-12  # squared: experts that differ by less than a millionth of their prediction are equal


@dataclass(frozen=True)
class Step:
    """One step of the SDE.

    unconditional, conditional: ε of every expert, (B, N, C, H, W). guidance: w. noise: z of the increment, (B, C, H, W),
    standard normal. steps: K, how many the whole way has.
    """

    unconditional: Tensor
    conditional: Tensor
    guidance: float
    sigma: float
    dsigma: float
    noise: Tensor
    steps: int

    def increment(self, velocity: Tensor) -> Tensor:
        """dx = 2 dsigma v + √(2 |dsigma| sigma) z: the reverse SDE, (B, C, H, W) -> (B, C, H, W)."""
        return 2 * self.dsigma * velocity + math.sqrt(2 * abs(self.dsigma) * self.sigma) * self.noise


def log_density_change(velocities: Tensor, increment: Tensor, sigma: float, dsigma: float) -> Tensor:
    """d log qᵢ = -⟨vᵢ, dx + |dsigma| vᵢ⟩ / sigma, whatever drove dx: (B, N, C, H, W), (B, C, H, W) -> (B, N).

    Theorem 1 with score -v/sigma and diffusion g² dt = 2 sigma |dsigma|.
    """
    return -(velocities * (increment[:, None] + abs(dsigma) * velocities)).flatten(2).sum(-1) / sigma


def published_change(velocities: Tensor, increment: Tensor, sigma: float, dsigma: float) -> Tensor:
    """The same as the published program has it for OR: with dsigma, which is negative, where the theorem has |dsigma|."""
    return -(velocities * (increment[:, None] + dsigma * velocities)).flatten(2).sum(-1) / sigma


def or_shares(log_densities: Tensor, log_prior: Tensor, temperature: float) -> Tensor:
    """κ = softmax(T (log q + log prior)): (B, N), (N,) -> (B, N). Algorithm 1, OR; a mixture of densities."""
    return torch.softmax(temperature * (log_densities + log_prior), dim=-1)


def or_velocity(step: Step, shares: Tensor) -> Tensor:
    """v = Σ κᵢ (uᵢ + w (cᵢ - uᵢ)): every expert guided by its own unconditional prediction. -> (B, C, H, W)."""
    guided = step.unconditional + step.guidance * (step.conditional - step.unconditional)
    return average(guided, shares)


def and_shares(step: Step, lift: float = 0.0) -> Tensor:
    """κ with Σ κ = 1 for which all log-densities change alike, the last one by lift/K more: -> (B, N).

    Proposition 6. With dᵢ = cᵢ - c_N and dx⁰ the increment of the last expert alone, for i, j < N:
    Σⱼ 2 dsigma w ⟨dᵢ, dⱼ⟩ κⱼ = |dsigma| ⟨c_N - cᵢ, c_N + cᵢ⟩ - ⟨dx⁰, dᵢ⟩ + sigma lift/K,
    which for two experts is the published formula.
    Where experts agree there is nothing to solve: the smallest solution is taken, and equal experts get 0.
    """
    conditional = step.conditional.flatten(2)  # (B, N, D)
    last = conditional[:, -1:]
    differences = conditional[:, :-1] - last  # (B, N-1, D)
    alone = step.increment(_and_base(step) + step.guidance * step.conditional[:, -1])
    right = abs(step.dsigma) * ((last - conditional[:, :-1]) * (last + conditional[:, :-1])).sum(-1)
    right = right - (alone.flatten(1)[:, None] * differences).sum(-1) + step.sigma * lift / step.steps  # (B, N-1)
    gram = differences @ differences.transpose(1, 2)  # (B, N-1, N-1)
    others = _solve(gram, right / (2 * step.dsigma * step.guidance), ROUNDING * last.square().sum((1, 2)))
    return torch.cat([others, 1 - others.sum(-1, keepdim=True)], dim=-1)


def and_velocity(step: Step, shares: Tensor) -> Tensor:
    """v = u + w (Σ κᵢ cᵢ - u), u the mean of the experts' unconditional predictions. -> (B, C, H, W)."""
    backwards = list(range(shares.shape[1]))[::-1]  # the last expert is the one the others are compared with
    return _and_base(step) + step.guidance * average(step.conditional[:, backwards], shares[:, backwards])


def _and_base(step: Step) -> Tensor:
    """(1 - w) u. The paper superposes conditions of one model, which has one u; experts have one each."""
    count = step.unconditional.shape[1]
    mean = average(step.unconditional, torch.full((count,), 1 / count))
    return (1 - step.guidance) * mean


def _solve(gram: Tensor, right: Tensor, smallest: Tensor) -> Tensor:
    """The smallest least-squares solution, in float64: (B, M, M), (B, M), (B,) eigenvalues below count as 0 -> (B, M)."""
    gram64, right64 = gram.cpu().double(), right.cpu().double()
    atol = smallest.cpu().double()
    inverse = torch.linalg.pinv(gram64, atol=atol, rtol=torch.zeros_like(atol), hermitian=True)
    return (inverse @ right64[..., None]).squeeze(-1).to(right)
