"""SuperDiff: superposition of experts by their estimated densities.

SuperDiff (arXiv:2412.17762) in a stock pipeline: a denoiser that hands on all predictions, a scheduler that
superposes them.

The method weighs experts by how likely each finds the increment, noise included, so weighing is done where
the increment is made. Noise comes from the images' own generators, as in any stochastic scheduler.

Superposition of densities while sampling: the formulas of SuperDiff in sigma space. Pure functions.

Source: Skreta et al., The superposition of diffusion models using the Itô density estimator,
arXiv:2412.17762. There x = x₀ + sigma ε, a model's velocity is its ε, and a step goes from sigma to sigma +
dsigma, with dsigma < 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.schedule import FLOW, Schedule, noise_of
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.sampling.average import average
from afa.sampling.base import Combination, Predict
from afa.sampling.options import SuperdiffAnd, SuperdiffOr
from afa.sampling.sample import PipelineSampler, check_guidable, in_frame
from afa.settings import shares

ROUNDING = 1e-12  # squared: experts that differ by less than a millionth of their prediction are equal


@dataclass(frozen=True)
class Step:
    """One step of the SDE.

    unconditional, conditional: ε of every expert, (B, N, C, H, W). guidance: w. noise: z of the increment,
                                (B, C, H, W),
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
    """The same as the published program has it for OR.

    With dsigma, which is negative, where the theorem has |dsigma|.
    """
    return -(velocities * (increment[:, None] + dsigma * velocities)).flatten(2).sum(-1) / sigma


def or_shares(log_densities: Tensor, log_prior: Tensor, temperature: float) -> Tensor:
    """κ = softmax(T (log q + log prior)): (B, N), (N,) -> (B, N). Algorithm 1, OR; a mixture of densities."""
    return torch.softmax(temperature * (log_densities + log_prior), dim=-1)


def or_velocity(step: Step, shares: Tensor) -> Tensor:
    """v = Σ κᵢ (uᵢ + w (cᵢ - uᵢ)): every expert guided by its own unconditional prediction.

    -> (B, C, H, W).
    """
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
    right = (
        right - (alone.flatten(1)[:, None] * differences).sum(-1) + step.sigma * lift / step.steps
    )  # (B, N-1)
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
    """The smallest least-squares solution, in float64.

    (B, M, M), (B, M), (B,) eigenvalues below count as 0 -> (B, M).
    """
    gram64, right64 = gram.cpu().double(), right.cpu().double()
    atol = smallest.cpu().double()
    inverse = torch.linalg.pinv(gram64, atol=atol, rtol=torch.zeros_like(atol), hermitian=True)
    return (inverse @ right64[..., None]).squeeze(-1).to(right)


# The published sampler's steps, whatever those of the experts' scheduler are.
SPACING = {
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}


class Rule(Protocol):
    """What is superposed."""

    def begin(self) -> None:
        """Forget the last images."""

    def increment(self, step: Step) -> Tensor:
        """The way of one step, (B, C, H, W)."""


class Or:
    """A mixture of the experts' densities. prior: one per expert, with sum 1.

    theorem: which estimate (see published_change).
    """

    def __init__(self, prior: Sequence[float], temperature: float, theorem: bool) -> None:
        self.log_prior = torch.tensor(prior).log()
        self.temperature = temperature
        self.change = log_density_change if theorem else published_change
        self.log_densities: Tensor | None = None  # (B, N), up to a constant

    def begin(self) -> None:
        self.log_densities = None

    def increment(self, step: Step) -> Tensor:
        if self.log_densities is None:
            self.log_densities = step.conditional.new_zeros(step.conditional.shape[:2])
        kappa = or_shares(self.log_densities, self.log_prior.to(self.log_densities), self.temperature)
        increment = step.increment(or_velocity(step, kappa))
        self.log_densities = self.log_densities + self.change(
            step.conditional, increment, step.sigma, step.dsigma
        )
        return increment


class And:
    """Where the experts' densities are equal; lift: of the last over the others."""

    def __init__(self, lift: float) -> None:
        self.lift = lift

    def begin(self) -> None:
        """Nothing is carried from step to step."""

    def increment(self, step: Step) -> Tensor:
        return step.increment(and_velocity(step, and_shares(step, self.lift)))


class Stacked(Combination):
    """Hands on what every expert predicts, (B, 2·N·C, H, W).

    Unconditional and conditional, one after another on the channels.

    Both halves of a batch doubled by guidance are equal, so the pipeline's own guidance leaves them as they
    are.
    run: the experts that are asked. guidance: set by the sampler.
    """

    def __init__(self, denoiser: EnsembleDenoiser, run: Sequence[int]) -> None:
        super().__init__(denoiser)
        self.run = list(run)
        self.guidance = 1.0

    @property
    def doubled(self) -> bool:
        """Whether a stock pipeline doubles the batch."""
        return self.guidance > 1

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        predictions = torch.stack([predict(expert) for expert in self.run], dim=1)  # (B or 2B, N, C, H, W)
        halves = predictions.chunk(2) if self.doubled else (predictions, predictions)
        stacked = torch.stack(halves, dim=1).flatten(1, 3)  # (B, 2·N·C, H, W)
        return (torch.cat([stacked, stacked]) if self.doubled else stacked), None


class SuperposedScheduler(EulerDiscreteScheduler):
    """The reverse SDE in sigma space, its velocity superposed by a rule.

    Made by `superposed`; guidance: set by the sampler.
    """

    rule: Rule
    guidance: float = 1.0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, **kwargs: Any
    ) -> None:
        """As the Euler scheduler's; begins anew."""
        super().set_timesteps(num_inference_steps, device=device, **kwargs)
        self.rule.begin()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step: model_output (B, 2·N·C, H, W) of Stacked, sample (B, C, H, W) -> the next sample.

        Computed in float32.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, after = self.sigmas[self.step_index].item(), self.sigmas[self.step_index + 1].item()
        unconditional, conditional = self._noises(model_output, sample, sigma)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        step = Step(
            unconditional,
            conditional,
            max(self.guidance, 1.0),
            sigma,
            after - sigma,
            noise,
            len(self.timesteps),
        )
        following = (sample.float() + self.rule.increment(step)).to(sample.dtype)
        self._step_index += 1
        return EulerDiscreteSchedulerOutput(prev_sample=following) if return_dict else (following,)

    def _noises(self, model_output: Tensor, sample: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """ε of every expert, without and with its condition: 2 × (B, N, C, H, W)."""
        alpha = 1 / (sigma**2 + 1)
        noisy = math.sqrt(alpha) * sample.float()[:, None, None]
        parts = model_output.float().unflatten(1, (2, -1, sample.shape[1]))  # (B, 2, N, C, H, W)
        levels = math.sqrt(alpha), math.sqrt(1 - alpha)
        unconditional, conditional = noise_of(self.config.prediction_type, parts, noisy, *levels).unbind(1)
        return unconditional, conditional


def superdiff_or(ensemble: Ensemble, options: SuperdiffOr) -> PipelineSampler:
    """κ = softmax(T (log q + log prior)), arXiv:2412.17762, algorithm 1."""
    prior = shares(options.weights, len(ensemble.names))
    run = [expert for expert, weight in enumerate(prior) if weight > 0]
    rule = Or([prior[expert] for expert in run], options.temperature, options.density == "theorem")
    return superposed(ensemble, rule, run)


def superdiff_and(ensemble: Ensemble, options: SuperdiffAnd) -> PipelineSampler:
    """Equal log-densities, arXiv:2412.17762, proposition 6."""
    return superposed(ensemble, And(options.lift), range(len(ensemble.names)))


def superposed(ensemble: Ensemble, rule: Rule, run: Sequence[int]) -> PipelineSampler:
    """The ensemble's frame with the experts of `run` superposed.

    The noise schedule is the frame's, the steps are the SDE's.
    """
    check_guidable(ensemble, "superdiff")
    config = ensemble.frame.scheduler.config
    if Schedule.of(ensemble.frame.scheduler).kind == FLOW:
        raise UserError(
            "superdiff makes its steps in x0 + sigma ε from a largest sigma, and a flow begins without any"
            " signal; choose another method"
        )
    scheduler = SuperposedScheduler.from_config(config, **SPACING)
    scheduler.rule = rule
    denoiser = Stacked(ensemble.denoiser, run)
    return PipelineSampler(in_frame(ensemble, denoiser, scheduler=scheduler), guided=(denoiser, scheduler))
