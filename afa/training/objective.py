"""What is minimised: the distance of the ensemble's prediction to the target of its prediction type, at random noise."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afa.errors import UserError
from afa.training.data import Encoded

TARGETS = ("epsilon", "v_prediction", "sample")


class Objective:
    """The diffusion loss, per sample. denoiser: the ensemble's, or a wrapper around it.

    scheduler: the frame's; its noise schedule and prediction type decide noise and target. snr_gamma: see weights().
    Raises UserError for a prediction type that has no target here.
    """

    def __init__(self, scheduler: Any, scaling_factor: float, shift_factor: float | None, device: torch.device, snr_gamma: float | None = None) -> None:
        from diffusers import DDPMScheduler

        self.noises = DDPMScheduler.from_config(scheduler.config)
        if self.noises.config.prediction_type not in TARGETS:
            raise UserError(f"prediction type '{self.noises.config.prediction_type}' cannot be trained; known are {', '.join(TARGETS)}")
        self.scale, self.shift, self.device, self.snr_gamma = scaling_factor, shift_factor or 0.0, device, snr_gamma

    def draw(self, data: Encoded, rows: list[int], rng: torch.Generator) -> "Batch":
        """Latents, noise and a uniform timestep for some rows, on the CPU, as is rng, which every random number comes from."""
        mean, log_variance = data.moments[rows].chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        latents = (mean + deviation * torch.randn(mean.shape, generator=rng) - self.shift) * self.scale
        timesteps = torch.randint(self.noises.config.num_train_timesteps, (len(rows),), generator=rng)
        return Batch(latents, torch.randn(latents.shape, generator=rng), timesteps)

    def spread(self, data: Encoded, seed: int) -> "Batch":
        """The fixed measure: every example once, its noise fixed, the timesteps spread evenly over all examples."""
        rng = torch.Generator().manual_seed(seed)
        batch = self.draw(data, list(range(len(data))), rng)
        steps = (torch.arange(len(data)) + 0.5) * self.noises.config.num_train_timesteps / len(data)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data)))
        batch.timesteps = steps.long()[order]
        return batch.to(self.device)

    def loss(self, denoiser: Any, batch: "Batch", text: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """Mean squared error of each sample, (B,) float32."""
        noisy = self.noises.add_noise(batch.latents, batch.noise, batch.timesteps)
        prediction = denoiser(noisy.to(dtype), batch.timesteps, **text, return_dict=False)[0]
        error: Tensor = (prediction.float() - self._target(batch)).square().mean((1, 2, 3))
        return error

    def weights(self, timesteps: Tensor) -> Tensor:
        """What a sample's loss counts in training, (B,): min-SNR-γ, ones without a γ. The held-out measure is never weighed.

        Source: Hang et al., arXiv:2303.09556, equations 5 to 7: min(SNR, γ) on the error of x0, as error of ε or v.
        """
        if self.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.noises, timesteps)
        per = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.noises.config.prediction_type]
        weights: Tensor = snr.clamp(max=self.snr_gamma) / per
        return weights

    def _target(self, batch: "Batch") -> Tensor:
        kind = self.noises.config.prediction_type
        if kind == "epsilon":
            return batch.noise
        return batch.latents if kind == "sample" else self.noises.get_velocity(batch.latents, batch.noise, batch.timesteps)


@dataclass
class Batch:
    """Clean latents (B, C, h, w), noise of the same shape, timesteps (B,)."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.latents.to(device), self.noise.to(device), self.timesteps.to(device))

    def part(self, start: int, stop: int) -> "Batch":
        """Samples start … stop-1."""
        return Batch(self.latents[start:stop], self.noise[start:stop], self.timesteps[start:stop])
