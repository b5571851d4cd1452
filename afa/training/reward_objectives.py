"""Objectives that follow a reward model: DRaFT (`draft`) and Direct-Align (`reward`).

DRaFT: the gradient of a reward through the last steps of sampling. Source: Clark et al., arXiv:2309.17400,
section 4.2 (the K last steps), and section 4.3 (DRaFT-LV: with K = 1 the last step is repeated from fresh
noise, for a gradient of less variance).

Direct-Align: the gradient of a reward through one step of recovery, at any noise. Source: Shen et al., SRPO,
arXiv:2509.06942, section 3.1: known noise is put into a clean image, the model makes one step, and what is
left of the known noise is taken out analytically, so that an image can be judged even at much noise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError, unknown
from afa.latents import latents_of
from afa.lazy import load
from afa.metrics.base import Differentiable
from afa.metrics.registry import METRICS, OWN_REWARDS, Resources, make_metric, rewards
from afa.training.conditions import equally_long
from afa.training.noise import Noising
from afa.training.objectives import Objective, ObjectiveContext, Pass
from afa.user_files import UserFile

# images (B, 3, H, W) about [-1, 1], captions -> (B,), higher is better, with gradients to the images
Reward = Callable[[Tensor, Sequence[str]], Tensor]


def make_reward(
    name: str, device: torch.device, weights: str | None = None, better: str = "", worse: str = ""
) -> Reward:
    """Return a reward by its name, or from a Python file with reward(images, captions).

    weights: where the weights of its model are; None: the hub
    better:  words before the caption whose reward counts for an image
    worse:   words before the caption whose reward counts against it
    With one of these, the reward is the difference between both captions: only what the words explain
    (semantic relative preference, arXiv:2509.06942, section 3.2).
    Raises UserError for an unknown name, or missing weights.
    """
    reward = _from_file(Path(name)) if name.endswith(".py") else _from_registry(name, device, weights)
    return relative(reward, better, worse) if better or worse else reward


def relative(reward: Reward, better: str, worse: str) -> Reward:
    """Return a reward's difference between a caption with better and with worse words before it."""

    def difference(images: Tensor, captions: Sequence[str]) -> Tensor:
        with_better, with_worse = (
            [f"{words}, {caption}" if words else caption for caption in captions] for words in (better, worse)
        )
        return reward(images, with_better) - reward(images, with_worse)

    return difference


def is_small(name: str | None) -> bool:
    """Return whether a reward reads no large weights, so that it can be tried on one image beforehand."""
    return name is not None and (name in OWN_REWARDS or name.endswith(".py"))


def _from_registry(name: str, device: torch.device, weights: str | None) -> Reward:
    """Return the reward of an embedded scorer, or of a differentiable metric."""
    if name in OWN_REWARDS:
        if weights is not None:
            raise UserError(f"reward '{name}' brings its own weights; leave out --reward-weights {weights}")
        own: Reward = load(OWN_REWARDS[name])(device)
        return own
    if name not in rewards():
        if name in METRICS:
            raise UserError(
                f"--reward {name} cannot be differentiated, or judges whole sets; take one of "
                f"{', '.join(rewards())}, or a Python file with reward(images, captions)"
            )
        raise UserError(
            f"--reward: {unknown(name, rewards(), 'reward')}, or give a Python file with reward(images,"
            " captions)"
        )
    metric: Any = make_metric(name, Resources(weights, device), flag="--reward-weights")
    assert isinstance(metric, Differentiable)
    return metric.reward


def _from_file(path: Path) -> Reward:
    """Return the function reward(images, captions) of a Python file, with a check of what it returns."""
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


class Decoder:
    """The decoder of a frozen VAE. Images are about [-1, 1]; they are not clipped, so that gradients live."""

    def __init__(self, vae: Any, checkpointing: bool = False) -> None:
        self.vae, self.latents = vae.requires_grad_(False), latents_of(vae)
        if checkpointing:
            self.latents.recompute(vae)

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) in the denoiser's units to images (B, 3, H, W) float32."""
        dtype = next(self.vae.parameters()).dtype
        return self.latents.draw(self.vae, self.latents.unscaled(latents).to(dtype)).to(torch.float32)


class Draft(Objective):
    """Minus the reward of images drawn from the batch's noise with the schedule's deterministic sampler.

    steps:    of sampling
    last:     how many of them, the last ones, have gradients
    guidance: strength of classifier-free guidance; None: the family's own
    again:    how often the last step is repeated from fresh noise (DRaFT-LV); only with last = 1
    Raises UserError if `last` and `again` do not fit.
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
        self.steps, self.last, self.guidance, self.extra_noise = steps, last, guidance, again

    def loss(self, work: Pass) -> Tensor:
        drawn = self._draw(work, partial(self._guided, work, *self._conditions(work)))
        return -torch.stack([self.reward(self.decoder(latents), work.captions) for latents in drawn]).mean(0)

    def _conditions(self, work: Pass) -> tuple[float, dict[str, Any]]:
        """Return the strength of guidance, and the denoiser's conditions: doubled where it is not 1."""
        interface, captioned = work.denoiser.interface, torch.zeros_like(work.dropped)
        strength = self.guidance
        if strength is None:
            strength = interface.default_cfg_scale(work.denoiser.config)
        if strength == 1:
            return strength, work.encode(captioned)
        halves = work.encode(~captioned), work.encode(captioned)
        one, other = reversed(halves) if interface.prompt_first else halves  # as the pipelines order them
        return strength, joined(one, other, interface.variable_length)

    def _draw(self, work: Pass, predict: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Return the clean latents of each sample, with gradients through the last steps.

        predict: (latents, timestep) -> guided prediction
        The list is longer than one if the last step is repeated.
        """
        sampler = self._sampler(work)
        latents = work.batch.noise * getattr(sampler, "init_noise_sigma", 1.0)
        outer = torch.is_grad_enabled()
        for place, time in enumerate(sampler.timesteps):
            with torch.set_grad_enabled(outer and place >= self.steps - self.last):
                latents = sampler.step(predict(latents, time), time, latents).prev_sample
        drawn = [latents]
        if self.extra_noise:
            assert work.batch.extra_noise is not None
            time, clean = sampler.timesteps[-1], latents.detach()
            nearest = int((self.noising.times.float() - float(time)).abs().argmin())
            step = torch.full((len(clean),), nearest, device=clean.device)
            for noise in work.batch.extra_noise[:, : self.extra_noise].unbind(1):
                noisy = self.noising.noisy(clean, noise, step)
                drawn.append(self._sampler(work).step(predict(noisy, time), time, noisy).prev_sample)
        return drawn

    def _guided(
        self, work: Pass, strength: float, conditions: dict[str, Any], latents: Tensor, time: Tensor
    ) -> Tensor:
        """Return the prediction with classifier-free guidance, (B, C, h, w)."""
        interface = work.denoiser.interface
        doubled = latents if strength == 1 else torch.cat([latents, latents])
        times = time.expand(len(doubled)).to(latents.device)
        prediction = work.predict(work.call, doubled, times, conditions)
        return (
            prediction
            if strength == 1
            else interface.apply_guidance(*interface.split_guidance(prediction), strength)
        )

    def _sampler(self, work: Pass) -> Any:
        """Return a deterministic scheduler of the noise schedule, with its timesteps set."""
        from diffusers import DDIMScheduler

        maker: Any = type(self.noising.scheduler) if self.noising.is_flow else DDIMScheduler
        interface = work.denoiser.interface
        changes = interface.scheduler_changes(work.denoiser.config)
        sampler = maker.from_config(self.noising.scheduler.config, **changes)
        height, width = work.batch.noise.shape[-2:]
        interface.set_timesteps(sampler, self.steps, (height, width))
        return sampler


def make_draft(context: ObjectiveContext) -> Draft:
    settings = context.settings
    return Draft(
        context.noising,
        context.decoder,
        context.reward,
        steps=settings.draft_steps,
        last=settings.draft_last,
        guidance=settings.draft_guidance,
        again=settings.draft_again,
    )


def joined(one: Any, other: Any, varying: bool) -> Any:
    """Return two batches of conditions as one batch.

    varying: whether their texts may differ in length; the shorter one is then padded
    """
    if isinstance(one, dict):
        return {name: joined(value, other[name], varying) for name, value in one.items()}
    if isinstance(one, list):
        return one + other
    return torch.cat(equally_long(one, other) if varying else (one, other))


class DirectAlign(Objective):
    """Minus the reward of the recovered image; 0 for a sample without its caption.

    From x_i = signal · x0 + noise · ε the model's prediction implies (x̂0, ε̂). A deterministic sampler takes
    these to an earlier step j, where the known ε is taken out:
    x0' = x̂0 + r_j / r_i · (x0 - x̂0), with r = noise / signal.
    So x0' is the data's image as far as the step does not reach, and the model's as far as it does.
    reach: j = (1 - reach) · i, above 0, at most 1; 1: x0' = x̂0
    Deviation: x0 is a training image's latent, not one that the model has drawn before (the source's
    "offline" form).
    """

    def __init__(self, noising: Noising, decoder: Decoder, reward: Reward, reach: float) -> None:
        self.noising, self.decoder, self.reward, self.reach = noising, decoder, reward, reach

    def loss(self, work: Pass) -> Tensor:
        found = self.reward(self.decoder(self.recovered(work)), work.captions)
        return -found * (~work.dropped).to(found.device, found.dtype)

    def recovered(self, work: Pass) -> Tensor:
        """Return x0', (B, C, h, w)."""
        if self.reach == 1:
            return work.clean
        steps = work.batch.steps
        earlier = (steps * (1 - self.reach)).long()
        left = self.noising.ratio(earlier) / self.noising.ratio(steps)
        return work.clean + left * (work.batch.latents - work.clean)


def make_direct_align(context: ObjectiveContext) -> DirectAlign:
    return DirectAlign(context.noising, context.decoder, context.reward, context.settings.reward_reach)
