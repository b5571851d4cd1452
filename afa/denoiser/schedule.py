"""What a model predicts, told by its scheduler: the kind of its predictions, and how much signal and noise there is at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError

FLOW = "flow"
NAMES = ("shift", "flow_shift", "use_flow_sigmas", "prediction_type")  # of a flow: the first is its own schedulers', the others are general ones'
DIFFUSION = ("epsilon", "v_prediction", "sample")  # of a diffusion schedule; a flow has one kind of its own
Level = Tensor | float  # of signal or noise: one number, or one that broadcasts over a batch


def clean_of(kind: str, prediction: Tensor, noisy: Tensor, signal: Level, noise: Level) -> Tensor:
    """x0 of a prediction for noisy = signal · x0 + noise · ε. Shapes are kept.

    v = signal · ε - noise · x0 (Salimans and Ho, arXiv:2202.00512, appendix D); a flow has signal + noise = 1 and answers ε - x0.
    """
    if kind == "epsilon":
        return (noisy - noise * prediction) / signal
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
        raise UserError(f"prediction type '{kind}' is not known here; known are {', '.join(DIFFUSION)}, and flow matching by its scheduler")
    return str(kind)


def flow_config(scheduler: Any) -> tuple[dict[str, Any], float]:
    """A flow's scheduler without what its kinds of schedulers name differently, and how far its steps are shifted towards the noise."""
    config = {name: value for name, value in scheduler.config.items() if name not in NAMES}
    return config, float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)


def tables(scheduler: Any) -> tuple[str, Tensor, Tensor, Tensor]:
    """-> kind of prediction; signal, noise and told time of every step of training, float32, from little noise to much."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    kind = kind_of(scheduler)
    if kind == FLOW:
        config, shift = flow_config(scheduler)
        flow = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
        noise = flow.sigmas[: flow.config.num_train_timesteps].flip(0)
        return kind, 1 - noise, noise, flow.timesteps.flip(0)
    kept = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
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
        """Of the models that a scheduler is for. Raises UserError for a kind of prediction that is not known."""
        from diffusers import DDPMScheduler

        kind = kind_of(scheduler)
        if kind == FLOW:
            return cls(kind, int(scheduler.config.num_train_timesteps))
        kept = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
        return cls(kind, len(kept), kept)

    def same_noise(self, other: "Schedule") -> bool:
        """Whether both have the same noise at the same time."""
        if self.kept is None or other.kept is None:
            return self.kept is other.kept and self.steps == other.steps
        return torch.equal(self.kept, other.kept)

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
        high = torch.searchsorted(-kept, -wanted).clamp(1, self.steps - 1)  # kept[high - 1] > wanted >= kept[high]
        above, below = kept[high - 1], kept[high]
        return high - 1 + ((above - wanted) / (above - below)).clamp(0, 1)


def _wide(times: Tensor) -> torch.dtype:
    return torch.float32 if times.device.type == "mps" else torch.float64  # which has no other
