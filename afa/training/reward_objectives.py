"""Objectives that follow a reward model: on claimed images, DRaFT, direct align.

`draft`: the gradient of an image reward through the last steps of sampling.

Source: Clark et al., DRaFT, arXiv:2309.17400: K last steps with gradients (section 4.2); with K = 1 the last
step may be repeated from fresh noise for a gradient of less variance (DRaFT-LV, section 4.3).

`reward`: the gradient of an image reward through a one-step recovery at any noise (Direct-Align).

Source: Shen et al., SRPO, arXiv:2509.06942, section 3.1: known noise is put into a clean image, the model
makes one step, and what is left of the known noise is taken out analytically, so that even at much noise an
image can be judged.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError, unknown
from afa.latents import latents_of
from afa.lazy import load
from afa.metrics.base import Differentiable
from afa.metrics.registry import METRICS, OWN_REWARDS, REWARDS, Resources, make_metric
from afa.training.conditions import equally_long
from afa.training.noise import Noising
from afa.training.objectives import Means, Objective, Pass
from afa.user_files import UserFile

# images (B, 3, H, W) about [-1, 1], captions -> (B,), higher is better, with gradients to the images
Reward = Callable[[Tensor, Sequence[str]], Tensor]


def make_reward(
    name: str, device: torch.device, weights: str | None = None, better: str = "", worse: str = ""
) -> Reward:
    """The reward of that name, or of a Python file with reward(images, captions).

    better, worse: words before the caption; with both, or one, the reward is that of the caption with the
                   better words minus that
    with the worse: what the words alone explain (semantic relative preference, arXiv:2509.06942, section
                    3.2).
    Raises UserError for a name that is none, or weights that are missing.
    """
    reward = _file(Path(name)) if name.endswith(".py") else _named(name, device, weights)
    return Relative(reward, better, worse) if better or worse else reward


def is_small(name: str | None) -> bool:
    """Whether a reward can be tried on one image without reading large weights.

    The embedded one, a user's own.
    """
    return name is not None and (name in OWN_REWARDS or name.endswith(".py"))


def _named(name: str, device: torch.device, weights: str | None) -> Reward:
    if name in OWN_REWARDS:
        if weights is not None:
            raise UserError(f"reward '{name}' brings its own weights; leave out --reward-weights {weights}")
        own: Reward = load(OWN_REWARDS[name])(device)
        return own
    if name not in REWARDS:
        if name in METRICS:
            listed = ", ".join(REWARDS)
            raise UserError(
                f"--reward {name} cannot be differentiated, or judges whole sets; take one of {listed}, or a"
                " Python file with reward(images, captions)"
            )
        raise UserError(
            f"--reward: {unknown(name, REWARDS, 'reward')}, or give a Python file with reward(images,"
            " captions)"
        )
    try:
        metric: Any = make_metric(name, Resources(weights, device))
    except UserError as error:
        raise UserError(str(error).replace(f"--metric-weights {name}=", "--reward-weights ")) from None
    assert isinstance(metric, Differentiable)
    return metric.reward


def _file(path: Path) -> Reward:
    """A user's own."""
    file = UserFile(path, "--reward")
    if not file.has("reward"):
        raise UserError(
            f"--reward {path} has no function reward(images, captions); it must return one number an image,"
            " with gradients"
        )

    def checked(images: Tensor, captions: Sequence[str]) -> Tensor:
        found: Any = file.call("reward", images, list(captions))
        if not isinstance(found, Tensor) or found.shape != (len(images),):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"reward() of {path} returned {what} for {len(images)} images, expected a tensor"
                f" ({len(images)},)"
            )
        if images.requires_grad and not found.requires_grad:
            raise UserError(
                f"reward() of {path} returned a tensor without gradients to the images; do not detach them"
            )
        return found

    return checked


class Relative:
    """A reward's difference between a caption with better and with worse words before it."""

    def __init__(self, reward: Reward, better: str, worse: str) -> None:
        self.reward, self.better, self.worse = reward, better, worse

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """As any reward."""
        return self.reward(images, self._with(self.better, captions)) - self.reward(
            images, self._with(self.worse, captions)
        )

    @staticmethod
    def _with(words: str, captions: Sequence[str]) -> list[str]:
        return [f"{words}, {caption}" if words else caption for caption in captions]


class Decoder:
    """A frozen VAE's decoder.

    Images come out as it makes them, about [-1, 1] but not cut there, so that gradients live.
    """

    def __init__(self, vae: Any, checkpointing: bool = False) -> None:
        self.vae, self.latents = vae.requires_grad_(False), latents_of(vae)
        if checkpointing:
            self.latents.recompute(vae)

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) in the denoiser's units -> (B, 3, H, W) float32."""
        dtype = next(self.vae.parameters()).dtype
        return self.latents.draw(self.vae, self.latents.unscaled(latents).to(dtype)).to(torch.float32)


class Draft(Objective):
    """Minus the reward of images drawn with guidance from the batch's noise.

    They are drawn by the deterministic sampler of the schedule.

    steps: of sampling; last: of these, how many with gradients. guidance: classifier-free; None: the family's
           own. again: LV's
    repetitions, for last = 1 only.
    Raises UserError where that does not fit.
    """

    def __init__(
        self,
        noising: Noising,
        decoder: Decoder,
        reward: Reward,
        *,
        steps: int,
        last: int,
        guidance: float | None,
        again: int = 0,
    ) -> None:
        if last > steps:
            raise UserError(f"--draft-last {last} must be at most --draft-steps {steps}")
        if again and last != 1:
            raise UserError(f"--draft-again {again} repeats the last step, and --draft-last is {last}; use 1")
        self.noising, self.decoder, self.reward = noising, decoder, reward
        self.steps, self.last, self.guidance, self.spare = steps, last, guidance, again

    def loss(self, work: Pass) -> Tensor:
        everybody = torch.zeros_like(work.dropped)
        conditions = (
            self._joined(work, ~everybody, everybody) if self._strength(work) != 1 else work.encode(everybody)
        )
        drawn = self._draw(work, conditions)
        rewards = torch.stack([self.reward(self.decoder(latents), work.captions) for latents in drawn])
        return -rewards.mean(0)

    def _strength(self, work: Pass) -> float:
        return (
            work.denoiser.call.classifier_free(work.denoiser.config)
            if self.guidance is None
            else self.guidance
        )

    def _joined(self, work: Pass, *dropped: Tensor) -> dict[str, Any]:
        """The conditions of two batches as one."""
        one, other = (work.encode(which) for which in dropped)
        return _joined(one, other, work.denoiser.call.varying)

    def _draw(self, work: Pass, conditions: dict[str, Any]) -> list[Tensor]:
        """The clean latents of each sample, with gradients through the last steps.

        Several where the last is repeated.
        """
        sampler = self._sampler(work)
        latents = work.batch.noise * getattr(sampler, "init_noise_sigma", 1.0)
        outer = torch.is_grad_enabled()
        for place, time in enumerate(sampler.timesteps):
            with torch.set_grad_enabled(outer and place >= self.steps - self.last):
                latents = sampler.step(
                    self._guided(work, latents, time, conditions), time, latents
                ).prev_sample
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
        without, with_caption = work.predict(
            work.call, twice, time.expand(len(twice)).to(latents.device), conditions
        ).chunk(2)
        return work.denoiser.call.combined(without, with_caption, strength)

    def _sampler(self, work: Pass) -> Any:
        from diffusers import DDIMScheduler

        maker: Any = type(self.noising.scheduler) if self.noising.is_flow else DDIMScheduler
        sampler = maker.from_config(self.noising.scheduler.config)
        height, width = work.batch.noise.shape[-2:]
        work.denoiser.call.schedule(sampler, self.steps, (height, width))
        return sampler


def make_draft(means: Means) -> Draft:
    settings = means.settings
    return Draft(
        means.noising,
        means.decoder,
        means.reward,
        steps=settings.draft_steps,
        last=settings.draft_last,
        guidance=settings.draft_guidance,
        again=settings.draft_again,
    )


def _joined(one: Any, other: Any, varying: bool) -> Any:
    """Two batches of conditions as one. varying: they may be of different lengths."""
    if isinstance(one, dict):
        return {name: _joined(value, other[name], varying) for name, value in one.items()}
    return torch.cat(equally_long(one, other) if varying else (one, other))


class DirectAlign(Objective):
    """Minus the reward of the recovered image; a sample without its caption has none.

    From x_i = signal x0 + noise ε the model claims (x̂0, ε̂). A deterministic sampler goes with these to an
    earlier step j, where the
    known ε is taken out: x0' = x̂0 + r_j / r_i · (x0 - x̂0), r = noise / signal. So the image is that of the
                          data as far as the
    step does not reach, and the model's as far as it does. reach: j = (1 - reach) · i; 1: the model's own
    x̂0. Deviation: x0 is a training image's latent, not one the model has drawn before (their "offline"
    form).
    """

    def __init__(self, noising: Noising, decoder: Decoder, reward: Reward, reach: float) -> None:
        self.noising, self.decoder, self.reward, self.reach = noising, decoder, reward, reach

    def loss(self, work: Pass) -> Tensor:
        rewards = self.reward(self.decoder(self.recovered(work)), work.captions)
        return -rewards * (~work.dropped).to(rewards.device, rewards.dtype)

    def recovered(self, work: Pass) -> Tensor:
        """x0' (B, C, h, w)."""
        if self.reach == 1:
            return work.clean
        steps = work.batch.steps
        earlier = (steps * (1 - self.reach)).long()
        left = self.noising.ratio(earlier) / self.noising.ratio(steps)
        return work.clean + left * (work.batch.latents - work.clean)


def make_direct_align(means: Means) -> DirectAlign:
    return DirectAlign(means.noising, means.decoder, means.reward, means.settings.reward_reach)
