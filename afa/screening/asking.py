"""Ask one expert at every probe, and keep what it got wrong."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.ensemble import Ensemble
from afa.screening.probes import Probes
from afa.screening.tapping import tapped
from afa.training.conditions import Conditions
from afa.training.noise import Batch, Noising
from afa.training.objectives.base import Pass


@dataclass(frozen=True)
class Answers:
    """At one image. errors (BANDS, D, C, h, w) float32 on the CPU: prediction minus target, in the frame's kind of prediction.

    features: by stage, (BANDS, C, places), at the first noise; empty where they were not asked for.
    """

    errors: Tensor
    features: dict[str, Tensor]


class Asking:
    """One expert, or an ensemble, asked image by image. batch_size: noisy latents in one pass of the denoiser."""

    def __init__(self, ensemble: Ensemble, conditions: Conditions, noising: Noising, probes: Probes, batch_size: int) -> None:
        self.denoiser, self.conditions, self.noising = ensemble.denoiser, conditions, noising
        self.probes, self.batch_size = probes, batch_size

    @torch.no_grad()
    def ask(self, image: int, features: bool = False) -> Answers:
        """What it says of one image with all its steps and noises."""
        noise = self.probes.noise(image)
        bands, draws = noise.shape[:2]
        steps = self.probes.steps(image, self.noising).repeat_interleave(draws)  # (BANDS·D,)
        latents = self.probes.latents[image].expand(bands * draws, *noise.shape[2:])
        prompt = self._prompt(image)
        errors: list[Tensor] = []
        seen: list[dict[str, Tensor]] = []
        with tapped(self.denoiser) if features else nullcontext({}) as passing:
            for part in self._parts(Batch(latents, noise.flatten(0, 1), steps)):
                errors.append(self._error(part, prompt).cpu())
                seen.append(dict(passing))
        joined = {name: torch.cat([one[name] for one in seen])[::draws] for name in seen[0]}
        return Answers(torch.cat(errors).unflatten(0, (bands, draws)), joined)

    def _prompt(self, image: int) -> dict[str, Any]:
        """Its caption, encoded once: the conditions of a batch of one."""
        caption, size = self.probes.captions[image], self.probes.sizes[image : image + 1]
        return self.conditions([caption], size, torch.zeros(1, dtype=torch.bool))

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        for start in range(0, len(batch.steps), self.batch_size):
            yield batch.part(start, min(start + self.batch_size, len(batch.steps))).to(self.noising.device)

    def _error(self, batch: Batch, prompt: dict[str, Any]) -> Tensor:
        count = len(batch.steps)
        work = Pass(
            self.denoiser,
            self.denoiser,
            self.noising,
            batch,
            captions=(),
            dropped=torch.zeros(count, dtype=torch.bool),
            encode=lambda dropped: repeated(prompt, count),
        )
        return work.prediction - self.noising.target(batch)


def repeated(conditions: dict[str, Any], count: int) -> dict[str, Any]:
    """The conditions of a batch of one, as they are for so many alike: tensors are expanded, not copied."""
    return {name: _repeated(value, count) for name, value in conditions.items()}


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, dict):
        return repeated(value, count)
    if isinstance(value, Tensor) and value.ndim and len(value) == 1:
        return value.expand(count, *value.shape[1:])
    return value
