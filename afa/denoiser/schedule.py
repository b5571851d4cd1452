"""Noise schedules, and the conversion between kinds of prediction (epsilon, v, sample, flow).

An expert with another kind of prediction or another noise schedule is called at the timestep of equal
signal-to-noise ratio, and its prediction is converted. Features cannot be converted: those of experts that
are called with different inputs have nothing in common.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError

FLOW = "flow"
# config keys of flows: the first in flow-matching schedulers, the others in general ones
NAMES = ("shift", "flow_shift", "use_flow_sigmas", "prediction_type")
DIFFUSION = ("epsilon", "v_prediction", "sample")  # kinds of prediction of diffusion models; flows have one
LEAST = 2**-12  # smallest signal to divide by, as in diffusers at zero terminal SNR
Level = Tensor | float  # of signal or noise: one number, or a tensor that broadcasts over a batch


def clean_of(kind: str, prediction: Tensor, noisy: Tensor, signal: Level, noise: Level) -> Tensor:
    """Compute the clean latents x0 from a prediction, where noisy = signal · x0 + noise · ε.

    kind:       epsilon (ε), v_prediction (v = signal · ε - noise · x0), sample (x0), or flow (ε - x0, with
                signal + noise = 1)
    prediction: (B, …)
    noisy:      (B, …) the model's input
    Returns (B, …). At zero terminal SNR ε does not determine x0; epsilon then divides by LEAST.
    Source of v: Salimans and Ho, arXiv:2202.00512, appendix D.
    """
    if kind == "epsilon":
        return (noisy - noise * prediction) / (
            signal.clamp(min=LEAST) if isinstance(signal, Tensor) else max(signal, LEAST)
        )
    if kind == "sample":
        return prediction
    return noisy - noise * prediction if kind == FLOW else signal * noisy - noise * prediction


def noise_of(kind: str, prediction: Tensor, noisy: Tensor, signal: Level, noise: Level) -> Tensor:
    """Compute the noise ε from a prediction; arguments as in clean_of."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (noisy - signal * prediction) / noise
    return noisy + signal * prediction if kind == FLOW else signal * prediction + noise * noisy


def prediction_of(kind: str, clean: Tensor, noisy: Tensor, signal: Level, noise: Level) -> Tensor:
    """Compute the prediction of a kind from clean latents: the inverse of clean_of."""
    if kind == "sample":
        return clean
    epsilon = (noisy - signal * clean) / noise
    if kind == "epsilon":
        return epsilon
    return epsilon - clean if kind == FLOW else signal * epsilon - noise * clean


def kind_of(scheduler: Any) -> str:
    """Return a scheduler's kind of prediction: one of DIFFUSION, or FLOW. Raises UserError for any other."""
    config = scheduler.config
    flows = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas")
    if flows or config.get("prediction_type") == "flow_prediction":
        return FLOW
    kind = config.get("prediction_type", "epsilon")
    if kind not in DIFFUSION:
        raise UserError(
            f"prediction type '{kind}' is not known here; "
            f"known are {', '.join(DIFFUSION)}, and flow matching by its scheduler"
        )
    return str(kind)


def flow_config(scheduler: Any) -> tuple[dict[str, Any], float]:
    """Return a flow scheduler's config without the keys of NAMES, and its shift of steps towards noise."""
    config = {name: value for name, value in scheduler.config.items() if name not in NAMES}
    return config, float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)


def is_edm(scheduler: Any) -> bool:
    """Return True for EDM schedulers, which count noise by sigma and precondition the model.

    Examples: Playground v2.5, CosXL, Stable Video; models are called at 0.25 · log(sigma), not a timestep.
    Source: Karras et al., arXiv:2206.00364.
    """
    kind = type(scheduler).__name__
    return kind.startswith(("EDM", "CosineDPM")) or scheduler.config.get("timestep_type") == "continuous"


def signal_table(scheduler: Any) -> Tensor:
    """Return the squared signal (alphas_cumprod) of every training timestep, falling, (steps,) float32.

    It is the scheduler's own table, so settings that its class ignores have no effect. At zero terminal SNR
    the last value is 0, where some classes have 2^-24.
    Raises UserError for a scheduler without such a table, or with a table that does not fall.
    """
    from diffusers import DDPMScheduler

    name = type(scheduler).__name__
    if is_edm(scheduler):
        raise UserError(
            f"the noise schedule of {name} is EDM's, counted by sigma; such models are drawn one by one "
            "with their own scheduler, and are neither trained nor combined with others"
        )
    own = getattr(scheduler, "alphas_cumprod", None)
    if own is None:
        raise UserError(f"{name} has no table of noise (alphas_cumprod); choose another scheduler")
    own = torch.as_tensor(own).float().cpu()
    steps = scheduler.config.num_train_timesteps
    if len(own) != steps:
        raise UserError(
            f"{name} has {len(own)} betas (trained_betas) for num_train_timesteps {steps}; "
            "mend its scheduler_config.json"
        )
    if not bool(((own[1:] < own[:-1]).all()) & (own[0] <= 1) & (own[-1] >= 0)):  # also false for NaN
        raise UserError(
            f"the betas of {name} are no noise schedule: the signal must fall from step to step; "
            "mend its scheduler_config.json"
        )
    usual = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return usual if alike(usual, own) else own


def noise_of_schedule(scheduler: Any) -> str:
    """Return the kind of a scheduler's noise in one word: flow, edm, zero_snr, or betas (any other)."""
    if kind_of(scheduler) == FLOW:
        return FLOW
    return "edm" if is_edm(scheduler) else "zero_snr" if Schedule.of(scheduler).zero_snr else "betas"


def alike(one: Tensor, other: Tensor) -> bool:
    """Return True if two tables of squared signal are equal up to rounding, in signal and in noise."""
    pairs = ((one, other), (1 - one, 1 - other))
    return one.shape == other.shape and all(torch.allclose(a, b, rtol=1e-5, atol=2e-7) for a, b in pairs)


def tables(scheduler: Any) -> tuple[str, Tensor, Tensor, Tensor]:
    """Return a scheduler's kind of prediction, and the training schedule in three tables.

    Returns kind; signal, noise and timestep, each (steps,), from little noise to much.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind = kind_of(scheduler)
    if kind == FLOW:
        config, shift = flow_config(scheduler)
        flow = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
        noise = flow.sigmas[: flow.config.num_train_timesteps].flip(0)
        return kind, 1 - noise, noise, flow.timesteps.flip(0)
    alphas_cumprod = signal_table(scheduler)
    return kind, alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5, torch.arange(len(alphas_cumprod))


@dataclass(frozen=True, eq=False)
class Schedule:
    """A model's kind of prediction, and its signal and noise at any time, fractions of a timestep included.

    kind:           one of DIFFUSION, or FLOW
    steps:          number of training timesteps
    alphas_cumprod: (steps,) squared signal of a diffusion schedule, falling; None for a flow, whose noise is
                    time / steps
    """

    kind: str
    steps: int
    alphas_cumprod: Tensor | None = None

    @classmethod
    def of(cls, scheduler: Any) -> "Schedule":
        """Read a scheduler. Raises UserError for an unknown kind of prediction or of noise."""
        kind = kind_of(scheduler)
        if kind == FLOW:
            return cls(kind, int(scheduler.config.num_train_timesteps))
        table = signal_table(scheduler)
        return cls(kind, len(table), table)

    def same_noise(self, other: "Schedule") -> bool:
        """Return True if both have the same noise at the same time, up to rounding."""
        if self.alphas_cumprod is None or other.alphas_cumprod is None:
            return self.alphas_cumprod is other.alphas_cumprod and self.steps == other.steps
        return alike(self.alphas_cumprod, other.alphas_cumprod)

    @property
    def zero_snr(self) -> bool:
        """True if a diffusion schedule ends without signal. Source: Lin et al., arXiv:2305.08891."""
        return self.alphas_cumprod is not None and float(self.alphas_cumprod[-1]) < 1e-7

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and noise at times of any shape, float64; times are clamped to the schedule."""
        times = times.to(_wide(times))
        if self.alphas_cumprod is None:
            noise = (times / self.steps).clamp(0, 1)
            return 1 - noise, noise
        place = times.clamp(0, self.steps - 1)
        low = place.floor().long()
        table = self.alphas_cumprod.to(times.device, times.dtype)
        between = torch.lerp(table[low], table[(low + 1).clamp(max=self.steps - 1)], place - low)
        return between.sqrt(), (1 - between).sqrt()

    def when(self, signal: Tensor, noise: Tensor) -> Tensor:
        """Return the times with this signal-to-noise ratio, clamped to the schedule: the inverse of `at`."""
        if self.alphas_cumprod is None:
            return self.steps * noise / (signal + noise)
        table = self.alphas_cumprod.to(signal.device, signal.dtype)
        wanted = signal**2 / (signal**2 + noise**2)
        high = torch.searchsorted(-table, -wanted).clamp(1, self.steps - 1)
        above, below = table[high - 1], table[high]  # above > wanted >= below
        return high - 1 + ((above - wanted) / (above - below)).clamp(0, 1)


def _wide(times: Tensor) -> torch.dtype:
    return torch.float32 if times.device.type == "mps" else torch.float64  # MPS has no float64


@dataclass(frozen=True, eq=False)
class Conversion:
    """The conversion between one expert's schedule and the frame's, with which the sampler works.

    own:   schedule of the expert
    frame: schedule of the frame, the shared scheduler
    In both, noisy = signal · x0 + noise · ε, each with its own levels. If both have the same noise at the
    same time, only the prediction is converted. A ratio beyond the end of the expert's schedule (a flow's
    first step is pure noise) becomes that end.
    """

    own: Schedule
    frame: Schedule

    def to_expert(self, noisy: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the sampler's noisy latents and times to the expert's convention.

        noisy: (B, …) latents
        times: () or (B,), in the unit of the frame's scheduler
        Returns latents (B, …) and times (B,) or (). Noisy latents of equal ratio differ by a factor:
        √(signal² + noise²) of the one schedule over that of the other.
        """
        if self.own.same_noise(self.frame):
            return noisy, times
        levels = self.frame.at(times)
        own_times = self.own.when(*levels)
        factor = torch.hypot(*self.own.at(own_times)) / torch.hypot(*levels)
        wide = _broadcast(noisy)
        return (noisy.to(wide) * _over(factor, noisy).to(wide)).to(noisy.dtype), own_times

    def to_frame(self, prediction: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Convert the expert's prediction to the frame's kind, by way of its clean latents.

        prediction: (B, …) of the expert
        noisy:      (B, …) latents of the frame
        times:      () or (B,), in the unit of the frame's scheduler
        """
        wide = _broadcast(prediction)
        own_noisy, own_times = self.to_expert(noisy.to(wide), times)
        own_signal, own_noise = (_over(level, noisy).to(wide) for level in self.own.at(own_times))
        clean = clean_of(self.own.kind, prediction.to(wide), own_noisy, own_signal, own_noise)
        signal, noise = (_over(level, noisy).to(wide) for level in self.frame.at(times))
        return prediction_of(self.frame.kind, clean, noisy.to(wide), signal, noise).to(prediction.dtype)


def conversion(own: Schedule, frame: Schedule) -> Conversion | None:
    """Return the conversion of an expert's predictions to the frame's kind; None if none is needed."""
    return None if own.kind == frame.kind and own.same_noise(frame) else Conversion(own, frame)


def _over(levels: Tensor, latents: Tensor) -> Tensor:
    """Shape levels () or (B,) so that they broadcast over latents (B, …)."""
    return levels if levels.ndim == 0 else levels.view(-1, *[1] * (latents.ndim - 1))


def _broadcast(latents: Tensor) -> torch.dtype:
    return torch.promote_types(latents.dtype, torch.float32)  # differences lose too much in half precision


def share_of_steps(scheduler: Any, timestep: Tensor | float | int) -> float:
    """Return the share of the steps that are done before the one at this timestep, 0 to below 1.

    scheduler: of a pipeline that is running
    timestep:  as the scheduler counts it
    """
    times = scheduler.timesteps
    now = torch.as_tensor(timestep).flatten()[0].to(times.device)
    return int((times - now).abs().argmin()) / len(times)
