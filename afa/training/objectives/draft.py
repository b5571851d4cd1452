"""`draft`: the gradient of an image reward through the last steps of sampling.

Source: Clark et al., DRaFT, arXiv:2309.17400: K last steps with gradients (section 4.2); with K = 1 the last step may be repeated from
fresh noise for a gradient of less variance (DRaFT-LV, section 4.3).
"""

from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.training.conditions import equally_long
from afa.training.noise import Noising
from afa.training.objectives.base import Objective, Pass
from afa.training.objectives.decode import Decoder
from afa.training.rewards import Reward


class Draft(Objective):
    """Minus the reward of images drawn with guidance from the batch's noise, by the deterministic sampler of the schedule.

    steps: of sampling; last: of these, how many with gradients. guidance: classifier-free; None: the family's own. again: LV's
    repetitions, for last = 1 only.
    Raises UserError where that does not fit.
    """

    def __init__(self, noising: Noising, decoder: Decoder, reward: Reward, *, steps: int, last: int, guidance: float | None, again: int = 0) -> None:
        if last > steps:
            raise UserError(f"--draft-last {last} must be at most --draft-steps {steps}")
        if again and last != 1:
            raise UserError(f"--draft-again {again} repeats the last step, and --draft-last is {last}; use 1")
        self.noising, self.decoder, self.reward = noising, decoder, reward
        self.steps, self.last, self.guidance, self.spare = steps, last, guidance, again

    def loss(self, work: Pass) -> Tensor:
        everybody = torch.zeros_like(work.dropped)
        conditions = self._joined(work, ~everybody, everybody) if self._strength(work) != 1 else work.encode(everybody)
        drawn = self._draw(work, conditions)
        rewards = torch.stack([self.reward(self.decoder(latents), work.captions) for latents in drawn])
        return -rewards.mean(0)

    def _strength(self, work: Pass) -> float:
        return work.denoiser.call.classifier_free(work.denoiser.config) if self.guidance is None else self.guidance

    def _joined(self, work: Pass, *dropped: Tensor) -> dict[str, Any]:
        """The conditions of two batches as one."""
        one, other = (work.encode(which) for which in dropped)
        return _joined(one, other, work.denoiser.call.varying)

    def _draw(self, work: Pass, conditions: dict[str, Any]) -> list[Tensor]:
        """The clean latents of each sample, with gradients through the last steps; several where the last is repeated."""
        sampler = self._sampler(work)
        latents = work.batch.noise * getattr(sampler, "init_noise_sigma", 1.0)
        outer = torch.is_grad_enabled()
        for place, time in enumerate(sampler.timesteps):
            with torch.set_grad_enabled(outer and place >= self.steps - self.last):
                latents = sampler.step(self._guided(work, latents, time, conditions), time, latents).prev_sample
        return [latents, *self._again(work, sampler.timesteps[-1], conditions, latents.detach())]

    def _again(self, work: Pass, time: Tensor, conditions: dict[str, Any], clean: Tensor) -> list[Tensor]:
        """The last step once more from each spare noise."""
        found: list[Tensor] = []
        if not self.spare:
            return found
        assert work.batch.spare is not None
        for noise in work.batch.spare[:, : self.spare].unbind(1):
            step = torch.full((len(clean),), self.step_of(time), device=clean.device)
            noisy = self.noising.noisy(clean, noise, step)
            fresh = self._sampler(work)
            found.append(fresh.step(self._guided(work, noisy, time, conditions), time, noisy).prev_sample)
        return found

    def step_of(self, time: Tensor) -> int:
        """The step whose told time is nearest."""
        return int((self.noising.times.float() - float(time)).abs().argmin())

    def _guided(self, work: Pass, latents: Tensor, time: Tensor, conditions: dict[str, Any]) -> Tensor:
        strength = self._strength(work)
        if strength == 1:
            return work.predict(work.call, latents, time.expand(len(latents)).to(latents.device), conditions)
        twice = torch.cat([latents, latents])
        without, with_caption = work.predict(work.call, twice, time.expand(len(twice)).to(latents.device), conditions).chunk(2)
        return work.denoiser.call.combined(without, with_caption, strength)

    def _sampler(self, work: Pass) -> Any:
        from diffusers import DDIMScheduler

        maker: Any = type(self.noising.scheduler) if self.noising.is_flow else DDIMScheduler
        sampler = maker.from_config(self.noising.scheduler.config)
        height, width = work.batch.noise.shape[-2:]
        work.denoiser.call.schedule(sampler, self.steps, (height, width))
        return sampler


def _joined(one: Any, other: Any, varying: bool) -> Any:
    """Two batches of conditions as one. varying: they may be of different lengths."""
    if isinstance(one, dict):
        return {name: _joined(value, other[name], varying) for name, value in one.items()}
    return torch.cat(equally_long(one, other) if varying else (one, other))
