"""Samplings by the model that is trained, whose latents it is trained on: distillation on its own policy.

A student that is trained on noised images, or on its teacher's latents, never sees the latents that its own
errors lead to. Here it does, at no cost: every training step takes the next denoising step of some running
samplings, and the prediction that gets the gradient is the one that leads the sampling on.
Source: Agarwal et al., arXiv:2306.13649, for language models. Deviation: samplings run on while the student
changes, one denoising step in a training step, so that a batch holds all noise levels; there each is drawn
anew.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from afa.denoiser.schedule import LEAST, clean_of, noise_of
from afa.stages.interface import ModelInterface
from afa.training.noise import Batch, Noising

GROUPS = 4  # of samplings, which take turns: the latents of a step are as many steps old


def implied(noising: Noising, predictions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the clean latents and the noise that predictions at a batch's noisy latents imply."""
    noisy, levels = noising.noisy(batch.latents, batch.noise, batch.steps), noising.levels(batch.steps)
    return clean_of(noising.kind, predictions, noisy, *levels), noise_of(
        noising.kind, predictions, noisy, *levels
    )


def spaced(noising: Noising, steps: int, shift: Tensor) -> Tensor:
    """Return the steps of samplings in the noise schedule, from noise to image: (n, steps).

    shift: (n, 1) from 0 to 1, by which share of their distance all are moved towards the image
    """
    found = (steps - torch.arange(steps) - shift) / steps * noising.steps
    return found.long().clamp(0, noising.steps - 1)


def beginning(noising: Noising, noise: Tensor, first: Tensor) -> Tensor:
    """Return the clean latents with which samplings are noise alone at their first step.

    Stock pipelines begin so at whatever timestep comes first, though its latents should hold some signal.
    noise: (n, C, h, w)
    first: (n,) step in the noise schedule
    """
    signal, level = noising.levels(first)
    return torch.where(signal > LEAST, noise * (1 - level) / signal.clamp(min=LEAST), 0.0)


class Trajectories:
    """Running samplings in groups; a training step continues one group by one denoising step (DDIM, η = 0).

    Between its steps a sampling is kept as the clean latents and the noise that its last prediction implies.
    With guidance, each sampling gives two samples of a batch, with its caption and without.

    noising:  the forward process
    interface: how the family's denoisers are guided
    shape:    (C, h, w) of the latents
    captions: how many there are to draw from
    samples:  of a training step, for all processes
    steps:    denoising steps of a sampling; its timesteps are shifted at random, by less than a step
    guidance: strength of guidance of the samplings; None: the prediction itself
    seed:     of all random numbers
    """

    def __init__(
        self,
        noising: Noising,
        interface: ModelInterface,
        shape: tuple[int, ...],
        captions: int,
        samples: int,
        steps: int,
        guidance: float | None,
        seed: int,
    ) -> None:
        self.noising, self.interface, self.captions = noising, interface, captions
        self.guidance, self.seed = guidance, seed
        self.copies = 1 if guidance is None else 2
        count = GROUPS, samples // self.copies
        self.clean, self.noise = torch.zeros(*count, *shape), torch.zeros(*count, *shape)
        self.steps = torch.zeros(*count, steps, dtype=torch.long)  # of the schedule, from noise to image
        self.place = torch.zeros(count, dtype=torch.long)  # the next of them
        self.end = torch.zeros(count, dtype=torch.long)  # the first that is not taken
        self.rows = torch.zeros(count, dtype=torch.long)  # of the captions

    def draw(self, step: int) -> tuple[list[int], Tensor, Batch]:
        """Return the samples of a training step.

        They are rows of captions, the mask (n,) of those without caption, and latents with noise and steps.
        """
        group = step % GROUPS
        self._begin(step, group)
        now = self.steps[group].gather(1, self.place[group][:, None])[:, 0]
        parts = (self.rows[group], self.clean[group], self.noise[group], now)
        rows, clean, noise, now = (part.repeat_interleave(self.copies, 0) for part in parts)
        dropped = torch.arange(len(rows)) % self.copies == 1
        return rows.tolist(), dropped, Batch(clean, noise, now)

    def advance(self, step: int, start: int, predictions: Tensor) -> None:
        """Take the denoising step of some samples of a training step.

        start:       the first sample's place in the step
        predictions: (n, C, h, w) for it and those after it
        """
        group, (first, last) = (
            step % GROUPS,
            (start // self.copies, (start + len(predictions)) // self.copies),
        )
        clean, noise = self.clean[group, first:last], self.noise[group, first:last]
        place = self.place[group, first:last]
        now = self.steps[group, first:last].gather(1, place[:, None])[:, 0]
        if self.guidance is not None:
            with_caption, without = predictions[0::2], predictions[1::2]
            predictions = self.interface.apply_guidance(without, with_caption, self.guidance)
        found = implied(self.noising, predictions, Batch(clean, noise, now))
        clean.copy_(found[0])
        noise.copy_(found[1])
        lost = ~(clean.isfinite() & noise.isfinite()).flatten(1).all(1)
        place += 1
        place[lost] = self.steps.shape[-1]  # it is begun anew

    def _begin(self, step: int, group: int) -> None:
        """Begin samplings anew that have ended; in the first round all, and these end at random steps."""
        rng = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.seed, step, 2, 0)).generate_state(1)[0])
        )
        count, most = self.steps.shape[1:]
        rows = torch.randint(self.captions, (count,), generator=rng)
        noise = torch.randn(self.noise[group].shape, generator=rng)
        shift = torch.rand((count, 1), generator=rng)
        end = torch.randint(1, most + 1, (count,), generator=rng)
        first = step < GROUPS
        steps = spaced(self.noising, most, shift)
        ended = torch.ones(count, dtype=torch.bool) if first else self.place[group] >= self.end[group]
        for kept, fresh in (
            (self.rows, rows),
            (self.noise, noise),
            (self.clean, beginning(self.noising, noise, steps[:, 0])),
            (self.steps, steps),
            (self.place, torch.zeros((), dtype=torch.long)),
            (self.end, end if first else torch.tensor(most)),
        ):
            mask = ended.view(-1, *[1] * (kept[group].ndim - 1))
            kept[group] = torch.where(mask, fresh, kept[group])

    def state(self) -> dict[str, Tensor]:
        """Return what the next steps depend on."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned. Raises ValueError if it is of other samplings."""
        if not 0 <= int(state["rows"].min()) <= int(state["rows"].max()) < self.captions:
            raise ValueError("its samplings are of other captions")
        for name, value in self.state().items():
            if state[name].shape != value.shape or state[name].dtype != value.dtype:
                raise ValueError(f"its samplings' {name} is {tuple(state[name].shape)}")
            value.copy_(state[name])
