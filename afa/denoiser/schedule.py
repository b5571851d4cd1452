"""Noise schedules, and the conversion between what experts predict (epsilon, v, sample, flow).

Experts of other kinds of prediction, or of another noise schedule: asked at equal signal-to-noise ratio, their answers converted.

Only whole predictions can be: features of experts that were told different things at a step have nothing in common.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError

FLOW = "flow"
NAMES = (
    "shift",
    "flow_shift",
    "use_flow_sigmas",
    "prediction_type",
)  # of a flow: the first is its own schedulers', the others are general ones'
DIFFUSION = ("epsilon", "v_prediction", "sample")  # of a diffusion schedule; a flow has one kind of its own
LEAST = 2**-12  # signal that is divided by, as diffusers has it at zero terminal SNR
Level = Tensor | float  # of signal or noise: one number, or one that broadcasts over a batch


def clean_of(kind: str, prediction: Tensor, noisy: Tensor, signal: Level, noise: Level) -> Tensor:
    """x0 of a prediction for noisy = signal · x0 + noise · ε. Shapes are kept.

    v = signal · ε - noise · x0 (Salimans and Ho, arXiv:2202.00512, appendix D); a flow has signal + noise = 1 and answers ε - x0.
    At zero terminal SNR ε says nothing of x0; the division is then by LEAST.
    """
    if kind == "epsilon":
        return (noisy - noise * prediction) / (
            signal.clamp(min=LEAST) if isinstance(signal, Tensor) else max(signal, LEAST)
        )
    if kind == "sample":
        return prediction
    return noisy - noise * prediction if kind == FLOW else signal * noisy - noise * prediction


def noise_of(kind: str, prediction: Tensor, noisy: Tensor, signal: Level, noise: Level) -> Tensor:
    """ε of a prediction, as in clean_of."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (noisy - signal * prediction) / noise
    return noisy + signal * prediction if kind == FLOW else signal * prediction + noise * noisy


def prediction_of(kind: str, clean: Tensor, noisy: Tensor, signal: Level, noise: Level) -> Tensor:
    """The prediction of that kind that claims these clean latents: the inverse of clean_of."""
    if kind == "sample":
        return clean
    said = (noisy - signal * clean) / noise
    if kind == "epsilon":
        return said
    return said - clean if kind == FLOW else signal * said - noise * clean


def kind_of(scheduler: Any) -> str:
    """The kind of prediction a scheduler works with: one of DIFFUSION, or FLOW. Raises UserError for any other."""
    config = scheduler.config
    flows = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas")
    if flows or config.get("prediction_type") == "flow_prediction":
        return FLOW
    kind = config.get("prediction_type", "epsilon")
    if kind not in DIFFUSION:
        raise UserError(
            f"prediction type '{kind}' is not known here; known are {', '.join(DIFFUSION)}, and flow matching by its scheduler"
        )
    return str(kind)


def flow_config(scheduler: Any) -> tuple[dict[str, Any], float]:
    """A flow's scheduler without what its kinds of schedulers name differently, and how far its steps are shifted towards the noise."""
    config = {name: value for name, value in scheduler.config.items() if name not in NAMES}
    return config, float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)


def is_edm(scheduler: Any) -> bool:
    """Whether a scheduler counts noise by sigma and preconditions its model: EDM (Karras et al., arXiv:2206.00364).

    So do those of Playground v2.5, CosXL and Stable Video; their models are called at 0.25 · log(sigma) instead of a timestep.
    """
    kind = type(scheduler).__name__
    return kind.startswith(("EDM", "CosineDPM")) or scheduler.config.get("timestep_type") == "continuous"


def signal_table(scheduler: Any) -> Tensor:
    """The squared signal (alphas_cumprod) of every training timestep, falling, float32.

    It is the scheduler's own table, so that a setting which its class does not know counts for nothing. At zero terminal SNR
    the last value is 0, where some classes keep 2^-24.
    Raises UserError for a scheduler that has no such table, or one that is no noise schedule.
    """
    from diffusers import DDPMScheduler

    name = type(scheduler).__name__
    if is_edm(scheduler):
        raise UserError(
            f"the noise schedule of {name} is EDM's, counted by sigma; such models are drawn one by one with their own scheduler,"
            " and are neither trained nor combined with others"
        )
    own = getattr(scheduler, "alphas_cumprod", None)
    if own is None:
        raise UserError(f"{name} has no table of noise (alphas_cumprod); choose another scheduler")
    own = torch.as_tensor(own).float().cpu()
    steps = scheduler.config.num_train_timesteps
    if len(own) != steps:
        raise UserError(
            f"{name} has {len(own)} betas (trained_betas) for num_train_timesteps {steps}; mend its scheduler_config.json"
        )
    if not bool(((own[1:] < own[:-1]).all()) & (own[0] <= 1) & (own[-1] >= 0)):  # also false for NaN
        raise UserError(
            f"the betas of {name} are no noise schedule: the signal must fall from step to step; mend its scheduler_config.json"
        )
    usual = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return usual if alike(usual, own) else own


def noise_of_schedule(scheduler: Any) -> str:
    """The kind of a scheduler's noise in a word: flow, edm, zero_snr, or betas for any other table."""
    if kind_of(scheduler) == FLOW:
        return FLOW
    return "edm" if is_edm(scheduler) else "zero_snr" if Schedule.of(scheduler).zero_snr else "betas"


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tables of squared signal are equal but for rounding, in their signal and in their noise."""
    pairs = ((one, other), (1 - one, 1 - other))
    return one.shape == other.shape and all(torch.allclose(a, b, rtol=1e-5, atol=2e-7) for a, b in pairs)


def tables(scheduler: Any) -> tuple[str, Tensor, Tensor, Tensor]:
    """-> kind of prediction; signal, noise and told time of every step of training, float32, from little noise to much."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind = kind_of(scheduler)
    if kind == FLOW:
        config, shift = flow_config(scheduler)
        flow = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
        noise = flow.sigmas[: flow.config.num_train_timesteps].flip(0)
        return kind, 1 - noise, noise, flow.timesteps.flip(0)
    kept = signal_table(scheduler)
    return kind, kept**0.5, (1 - kept) ** 0.5, torch.arange(len(kept))


@dataclass(frozen=True, eq=False)
class Schedule:
    """The kind of a model's predictions, and its noise at any time, as its scheduler counts times; between whole ones, too.

    kept: ᾱ of a diffusion schedule at times 0 … steps-1, falling; None for a flow, whose noise is its time over its steps.
    """

    kind: str
    steps: int
    kept: Tensor | None = None

    @classmethod
    def of(cls, scheduler: Any) -> "Schedule":
        """Of the models that a scheduler is for. Raises UserError for a kind of prediction or of noise that is not known."""
        kind = kind_of(scheduler)
        if kind == FLOW:
            return cls(kind, int(scheduler.config.num_train_timesteps))
        kept = signal_table(scheduler)
        return cls(kind, len(kept), kept)

    def same_noise(self, other: "Schedule") -> bool:
        """Whether both have the same noise at the same time, but for rounding."""
        if self.kept is None or other.kept is None:
            return self.kept is other.kept and self.steps == other.steps
        return alike(self.kept, other.kept)

    @property
    def zero_snr(self) -> bool:
        """Whether a diffusion schedule ends without any signal (zero terminal SNR, Lin et al., arXiv:2305.08891)."""
        return self.kept is not None and float(self.kept[-1]) < 1e-7

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at times, of their shape, in double precision. Outside the schedule, at its end."""
        times = times.to(_wide(times))
        if self.kept is None:
            noise = (times / self.steps).clamp(0, 1)
            return 1 - noise, noise
        place = times.clamp(0, self.steps - 1)
        low = place.floor().long()
        kept = self.kept.to(times.device, times.dtype)
        between = torch.lerp(kept[low], kept[(low + 1).clamp(max=self.steps - 1)], place - low)
        return between.sqrt(), (1 - between).sqrt()

    def when(self, signal: Tensor, noise: Tensor) -> Tensor:
        """The times of equal signal-to-noise ratio: the inverse of at. A ratio that the schedule does not reach: its end."""
        if self.kept is None:
            return self.steps * noise / (signal + noise)
        kept = self.kept.to(signal.device, signal.dtype)
        wanted = signal**2 / (signal**2 + noise**2)
        high = torch.searchsorted(-kept, -wanted).clamp(
            1, self.steps - 1
        )  # kept[high - 1] > wanted >= kept[high]
        above, below = kept[high - 1], kept[high]
        return high - 1 + ((above - wanted) / (above - below)).clamp(0, 1)


def _wide(times: Tensor) -> torch.dtype:
    return torch.float32 if times.device.type == "mps" else torch.float64  # which has no other


@dataclass(frozen=True, eq=False)
class Conversion:
    """One expert's way of predicting, `own`, seen from the one that the sampler works with, `frame`.

    noisy = signal · x0 + noise · ε in both, with levels of their own. Where both have the same noise at the same time, only
    the answer is converted. Past the end of the expert's schedule (a flow's first step is pure noise) it is asked at that end.
    """

    own: Schedule
    frame: Schedule

    def given(self, noisy: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """What the expert is handed instead of noisy latents (B, …) at times () or (B,): the same latents in its own convention.

        Noisy latents of equal ratio differ by a factor: √(signal² + noise²) of the one over that of the other.
        """
        if self.own.same_noise(self.frame):
            return noisy, times
        levels = self.frame.at(times)
        own_times = self.own.when(*levels)
        factor = torch.hypot(*self.own.at(own_times)) / torch.hypot(*levels)
        wide = _broadcast(noisy)
        return (noisy.to(wide) * _over(factor, noisy).to(wide)).to(noisy.dtype), own_times

    def answer(self, prediction: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The expert's prediction as the frame's kind, through the clean latents it claims; noisy and times: the frame's."""
        wide = _broadcast(prediction)
        own_noisy, own_times = self.given(noisy.to(wide), times)
        own_signal, own_noise = (_over(level, noisy).to(wide) for level in self.own.at(own_times))
        clean = clean_of(self.own.kind, prediction.to(wide), own_noisy, own_signal, own_noise)
        signal, noise = (_over(level, noisy).to(wide) for level in self.frame.at(times))
        return prediction_of(self.frame.kind, clean, noisy.to(wide), signal, noise).to(prediction.dtype)


def conversion(own: Schedule, frame: Schedule) -> Conversion | None:
    """How an expert's predictions become the frame's; None where they are already."""
    return None if own.kind == frame.kind and own.same_noise(frame) else Conversion(own, frame)


def _over(levels: Tensor, latents: Tensor) -> Tensor:
    """One level for all, or one an image, as it broadcasts over latents (B, …)."""
    return levels if levels.ndim == 0 else levels.view(-1, *[1] * (latents.ndim - 1))


def _broadcast(latents: Tensor) -> torch.dtype:
    return torch.promote_types(latents.dtype, torch.float32)  # half precision would lose what is subtracted
