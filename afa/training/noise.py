"""The forward process: adds noise to clean latents, and gives the denoiser's target."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afa.denoiser.schedule import FLOW, LEAST, clean_of, tables
from afa.errors import UserError
from afa.latents import Latents
from afa.training.data import Encoded

DENSITIES = ("uniform", "logit_normal", "mode")  # how steps are drawn
WEIGHTINGS = ("sigma_sqrt", "cosmap")  # of a flow's loss


class Noising:
    """The forward process x = signal(i) · x0 + noise(i) · ε, and its inversions.

    Steps i run from 0 (nearly clean) to steps-1 (nearly noise).
    scheduler: the frame's, with its noise schedule and prediction type; flow matching has signal 1 - s, noise
               s
    latents:   of the frame's VAE
    density:   one of DENSITIES: how training draws steps
    within:    first and last step that training draws; None: all
    Raises UserError for a prediction type without a training target, and for a range beyond the schedule.
    """

    def __init__(
        self,
        scheduler: Any,
        latents: Latents,
        device: torch.device,
        density: str = "uniform",
        within: Sequence[int] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.kind, self.signal, self.noise, self.times = tables(scheduler)
        self.steps = len(self.times)
        self.latents, self.device, self.density = latents, device, density
        self.first, self.last = within or (0, self.steps - 1)
        if self.last >= self.steps:
            raise UserError(
                f"--timestep-range {self.first} {self.last} goes beyond the schedule; "
                f"its last timestep is {self.steps - 1}"
            )

    def draw(self, data: Encoded, rows: list[int], rng: torch.Generator, extra_noise: int = 0) -> "Batch":
        """Draw latents, noise and steps for some rows, on the CPU.

        rng:         of all random numbers, on the CPU
        extra_noise: how many more tensors of noise to draw per sample
        """
        mean, log_variance = data.moments[rows].chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        latents = self.latents.scaled(mean + deviation * torch.randn(mean.shape, generator=rng))
        steps = self._steps(len(rows), rng)
        noise = torch.randn(latents.shape, generator=rng)
        more = None
        if extra_noise:
            more = torch.randn((len(rows), extra_noise, *latents.shape[1:]), generator=rng)
        return Batch(latents, noise, steps, more)

    def _steps(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw steps: uniform, or by the densities of SD3.

        Source: Esser et al., arXiv:2403.03206, section 3.1, as in diffusers.
        """
        if self.density == "uniform":
            return torch.randint(self.first, self.last + 1, (count,), generator=rng)
        from diffusers.training_utils import compute_density_for_timestep_sampling

        # diffusers counts from the noise: 0 is pure noise there
        place = compute_density_for_timestep_sampling(
            self.density, count, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=rng
        )
        span = self.last + 1 - self.first
        return (self.last - (place * span).long()).clamp(self.first, self.last)

    def spread(self, data: Encoded, seed: int, extra_noise: int = 0) -> "list[tuple[list[int], Batch]]":
        """Return the held-out images: each once, with fixed noise and evenly spread steps.

        Returns rows and their batch for each size.
        """
        rng = torch.Generator().manual_seed(seed)
        steps = (torch.arange(len(data)) + 0.5) * self.steps / len(data)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data)))
        found = []
        for rows in (sorted(set(group)) for group in data.groups):
            batch = self.draw(data, rows, rng, extra_noise)
            batch.steps = steps.long()[order][rows]
            found.append((rows, batch.to(self.device)))
        return found

    def noisy(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return the noisy latents (B, C, h, w)."""
        return self._at(self.signal, steps) * latents + self._at(self.noise, steps) * noise

    def timesteps(self, steps: Tensor) -> Tensor:
        """Return the timesteps that the denoiser gets: (B,)."""
        return self.times.to(steps.device)[steps]

    def target(self, batch: "Batch") -> Tensor:
        """Return the target of the prediction: (B, C, h, w)."""
        if self.kind == "epsilon":
            return batch.noise
        if self.kind == "sample":
            return batch.latents
        if self.kind == FLOW:
            return batch.noise - batch.latents
        return (
            self._at(self.signal, batch.steps) * batch.noise
            - self._at(self.noise, batch.steps) * batch.latents
        )

    def clean(self, noisy: Tensor, prediction: Tensor, steps: Tensor) -> Tensor:
        """Return the clean latents that a prediction implies: (B, C, h, w)."""
        return clean_of(self.kind, prediction, noisy, *self.levels(steps))

    def levels(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and noise of some steps: (B, 1, 1, 1) each."""
        return self._at(self.signal, steps), self._at(self.noise, steps)

    def ratio(self, steps: Tensor) -> Tensor:
        """Return noise over signal, (B, 1, 1, 1): the factor of an x0 error when a sampler takes a step."""
        return self._at(self.noise, steps) / self._at(self.signal, steps).clamp(min=LEAST)

    def min_snr(self, steps: Tensor, gamma: float) -> Tensor:
        """Return the min-SNR loss weight of each sample, (B,).

        Source: Hang et al., arXiv:2303.09556, equations 5 to 7: min(SNR, γ) on the squared error of x0, here
        in units of the target's error.
        """
        snr = self.ratio(steps).view(-1) ** -2
        below = (gamma / snr).clamp(max=1)  # min(SNR, γ) / SNR
        if self.kind == "epsilon":
            return below
        return snr.clamp(max=gamma) * (
            1 if self.kind == "sample" else self._at(self.noise, steps).view(-1) ** 2
        )

    def flow_weighting(self, steps: Tensor, scheme: str) -> Tensor:
        """Return SD3's loss weight of each sample of a flow, (B,).

        scheme: one of WEIGHTINGS
        Source: arXiv:2403.03206, as in diffusers.
        """
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        weights: Tensor = compute_loss_weighting_for_sd3(scheme, sigmas=self._at(self.noise, steps).view(-1))
        return weights

    def _at(self, table: Tensor, steps: Tensor) -> Tensor:
        return table.to(steps.device)[steps].view(-1, 1, 1, 1)

    @cached_property
    def is_flow(self) -> bool:
        return self.kind == FLOW


@dataclass
class Batch:
    """A batch of the forward process.

    latents:     (B, C, h, w), clean
    noise:       (B, C, h, w)
    steps:       (B,)
    extra_noise: (B, n, C, h, w) more noise for objectives that need it; None: none
    """

    latents: Tensor
    noise: Tensor
    steps: Tensor
    extra_noise: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.latents.to(device),
            self.noise.to(device),
            self.steps.to(device),
            None if self.extra_noise is None else self.extra_noise.to(device),
        )

    def joined(self, other: "Batch") -> "Batch":
        """Return these samples and then others; neither has extra noise."""
        pairs = (self.latents, other.latents), (self.noise, other.noise), (self.steps, other.steps)
        return Batch(*(torch.cat(pair) for pair in pairs))

    def part(self, start: int, stop: int) -> "Batch":
        """Return samples start … stop-1."""
        more = None if self.extra_noise is None else self.extra_noise[start:stop]
        return Batch(self.latents[start:stop], self.noise[start:stop], self.steps[start:stop], more)
