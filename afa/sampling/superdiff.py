"""SuperDiff: superposition of experts by their estimated densities, in a stock diffusers pipeline.

Source: Skreta et al., The superposition of diffusion models using the Itô density estimator,
arXiv:2412.17762. There x = x₀ + sigma ε, a model's velocity is its ε, and a step goes from sigma to sigma +
dsigma, with dsigma < 0.

The method weighs experts by how likely each finds the increment of a step, its noise included, so it weighs
them where the increment is made. Therefore a denoiser returns the predictions of all experts, and a scheduler
superposes them. The noise comes from the images' own generators, as in any stochastic scheduler.
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
class SdeStep:
    """One step of the reverse SDE.

    unconditional: ε of every expert without the prompt, (B, N, C, H, W)
    conditional:   ε of every expert with the prompt, (B, N, C, H, W)
    guidance:      w, strength of classifier-free guidance
    sigma:         level of the noise
    dsigma:        its change, below 0
    noise:         z of the increment, standard normal, (B, C, H, W)
    steps:         K, the number of steps of the whole sampling
    """

    unconditional: Tensor
    conditional: Tensor
    guidance: float
    sigma: float
    dsigma: float
    noise: Tensor
    steps: int

    def increment(self, velocity: Tensor) -> Tensor:
        """Return dx = 2 dsigma v + √(2 |dsigma| sigma) z for a velocity v: (B, C, H, W) to (B, C, H, W)."""
        return 2 * self.dsigma * velocity + math.sqrt(2 * abs(self.dsigma) * self.sigma) * self.noise


def log_density_change(velocities: Tensor, increment: Tensor, sigma: float, dsigma: float) -> Tensor:
    """Return the change of every expert's log-density, d log qᵢ = -⟨vᵢ, dx + |dsigma| vᵢ⟩ / sigma.

    velocities: (B, N, C, H, W)
    increment:  dx (B, C, H, W), of any process
    Returns (B, N).
    Source: theorem 1, with score -v / sigma and diffusion g² dt = 2 sigma |dsigma|.
    """
    return -(velocities * (increment[:, None] + abs(dsigma) * velocities)).flatten(2).sum(-1) / sigma


def published_change(velocities: Tensor, increment: Tensor, sigma: float, dsigma: float) -> Tensor:
    """Return log_density_change as the published program computes it for OR.

    It has dsigma, which is negative, where the theorem has |dsigma|.
    """
    return -(velocities * (increment[:, None] + dsigma * velocities)).flatten(2).sum(-1) / sigma


def or_shares(log_densities: Tensor, log_prior: Tensor, temperature: float) -> Tensor:
    """Return the shares κ = softmax(T (log q + log prior)) of a mixture of densities.

    log_densities: log q (B, N), up to a constant
    log_prior:     (N,)
    temperature:   T
    Returns (B, N). Source: algorithm 1, OR.
    """
    return torch.softmax(temperature * (log_densities + log_prior), dim=-1)


def or_velocity(step: SdeStep, shares: Tensor) -> Tensor:
    """Return v = Σ κᵢ (uᵢ + w (cᵢ - uᵢ)), (B, C, H, W).

    Every expert is guided by its own unconditional prediction.
    """
    guided = step.unconditional + step.guidance * (step.conditional - step.unconditional)
    return average(guided, shares)


def and_shares(step: SdeStep, lift: float = 0.0) -> Tensor:
    """Return the shares κ (B, N), with sum 1, for which the log-densities of all experts change equally.

    lift: how much more the last expert's log-density rises over all K steps
    With dᵢ = cᵢ - c_N and dx⁰ the increment of the last expert alone, for i, j < N:
    Σⱼ 2 dsigma w ⟨dᵢ, dⱼ⟩ κⱼ = |dsigma| ⟨c_N - cᵢ, c_N + cᵢ⟩ - ⟨dx⁰, dᵢ⟩ + sigma lift / K,
    which is the published formula for two experts.
    Where experts agree, the equations do not determine κ: the smallest solution is taken, and equal experts
    get 0. Source: proposition 6.
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


def and_velocity(step: SdeStep, shares: Tensor) -> Tensor:
    """Return v = u + w (Σ κᵢ cᵢ - u), (B, C, H, W); u is the mean of the unconditional predictions."""
    backwards = list(range(shares.shape[1]))[::-1]  # the last expert is the one the others are compared with
    return _and_base(step) + step.guidance * average(step.conditional[:, backwards], shares[:, backwards])


def _and_base(step: SdeStep) -> Tensor:
    """Return (1 - w) u, (B, C, H, W).

    Deviation: the paper superposes conditions of one model, which has one u; experts have one each.
    """
    count = step.unconditional.shape[1]
    mean = average(step.unconditional, torch.full((count,), 1 / count))
    return (1 - step.guidance) * mean


def _solve(gram: Tensor, right: Tensor, smallest: Tensor) -> Tensor:
    """Return the smallest least-squares solution, (B, M), computed in float64.

    gram:     (B, M, M)
    right:    (B, M)
    smallest: (B,) smaller eigenvalues are taken as 0
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
    """How the experts' densities are superposed."""

    def begin(self) -> None:
        """Begin new images."""

    def increment(self, step: SdeStep) -> Tensor:
        """Return the increment of one step, (B, C, H, W)."""


class Or:
    """A mixture of the experts' densities.

    prior:       one weight per expert, with sum 1
    temperature: T of or_shares
    theorem:     whether log-densities are estimated by the theorem, not as the published program does
    """

    def __init__(self, prior: Sequence[float], temperature: float, theorem: bool) -> None:
        self.log_prior = torch.tensor(prior).log()
        self.temperature = temperature
        self.change = log_density_change if theorem else published_change
        self.log_densities: Tensor | None = None  # (B, N), up to a constant

    def begin(self) -> None:
        self.log_densities = None

    def increment(self, step: SdeStep) -> Tensor:
        if self.log_densities is None:
            self.log_densities = step.conditional.new_zeros(step.conditional.shape[:2])
        kappa = or_shares(self.log_densities, self.log_prior.to(self.log_densities), self.temperature)
        increment = step.increment(or_velocity(step, kappa))
        self.log_densities = self.log_densities + self.change(
            step.conditional, increment, step.sigma, step.dsigma
        )
        return increment


class And:
    """Images that all experts find equally likely.

    lift: how much more likely the last expert finds them, in nats
    """

    def __init__(self, lift: float) -> None:
        self.lift = lift

    def begin(self) -> None:
        """Do nothing: no state is kept between steps."""

    def increment(self, step: SdeStep) -> Tensor:
        return step.increment(and_velocity(step, and_shares(step, self.lift)))


class Stacked(Combination):
    """Returns the unconditional and the conditional predictions of all experts as channels: (B, 2·N·C, H, W).

    If guidance doubles the batch, both halves of the result are equal, so the pipeline's own guidance changes
    nothing.
    run:      indices of the experts that are run
    guidance: set by the sampler
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
    """The reverse SDE in sigma space, with a velocity that a rule superposes; made by superposed().

    guidance: set by the sampler
    """

    rule: Rule
    guidance: float = 1.0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, **kwargs: Any
    ) -> None:
        """Set the timesteps as the Euler scheduler does, and begin new images."""
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
        """Make one step, computed in float32.

        model_output: (B, 2·N·C, H, W) of Stacked
        sample:       (B, C, H, W)
        Returns the next sample.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, after = self.sigmas[self.step_index].item(), self.sigmas[self.step_index + 1].item()
        unconditional, conditional = self._noises(model_output, sample, sigma)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        step = SdeStep(
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
        """Return ε of every expert, without and with the prompt: (B, N, C, H, W) each."""
        alpha = 1 / (sigma**2 + 1)
        noisy = math.sqrt(alpha) * sample.float()[:, None, None]
        parts = model_output.float().unflatten(1, (2, -1, sample.shape[1]))  # (B, 2, N, C, H, W)
        levels = math.sqrt(alpha), math.sqrt(1 - alpha)
        unconditional, conditional = noise_of(self.config.prediction_type, parts, noisy, *levels).unbind(1)
        return unconditional, conditional


def superdiff_or(ensemble: Ensemble, options: SuperdiffOr) -> PipelineSampler:
    """Return a sampler of the mixture of the experts' densities (algorithm 1, OR)."""
    prior = shares(options.weights, len(ensemble.names))
    run = [expert for expert, weight in enumerate(prior) if weight > 0]
    rule = Or([prior[expert] for expert in run], options.temperature, options.density == "theorem")
    return superposed(ensemble, rule, run)


def superdiff_and(ensemble: Ensemble, options: SuperdiffAnd) -> PipelineSampler:
    """Return a sampler of images that all experts find equally likely (proposition 6, AND)."""
    return superposed(ensemble, And(options.lift), range(len(ensemble.names)))


def superposed(ensemble: Ensemble, rule: Rule, run: Sequence[int]) -> PipelineSampler:
    """Return a sampler in the ensemble's frame that superposes the experts of `run` by a rule.

    The noise schedule is the frame's; the steps are the SDE's.
    Raises UserError for flow models.
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
