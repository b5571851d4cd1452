"""The teacher of a distillation: an ensemble, whose prediction is the target of the student's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afa.ensemble import Ensemble
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.noise import Batch, Noising
from afa.training.objectives import Pass, predict
from afa.training.trajectories import Trajectories, beginning, implied, spaced


class Teacher:
    """Answers at the latents, timesteps and captions of a batch that a student is trained on.

    ensemble: is frozen
    guidance: strength of the guidance that the student learns to predict in one pass; None: the student
              learns the predictions with and without caption themselves
    Source of guidance in one pass: Meng et al., arXiv:2210.03142, here at one fixed strength.
    """

    def __init__(self, ensemble: Ensemble, device: torch.device, guidance: float | None = None) -> None:
        self.denoiser, self.guidance = ensemble.denoiser.eval().requires_grad_(False), guidance
        self.conditions = Conditions(ensemble.pipeline(), self.denoiser, device)

    def __call__(self, work: Pass) -> Tensor:
        """Return the target of the samples that it is asked for, (n, C, h, w) float32."""
        assert work.sizes is not None
        asked = slice(work.asked)
        given = (work.noisy[asked], work.timesteps[asked], work.captions[asked], work.sizes[asked])
        return (
            self._predict(*given, work.dropped[asked])
            if self.guidance is None
            else self.guided(*given, self.guidance)
        )

    def guided(
        self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str], sizes: Tensor, strength: float | None
    ) -> Tensor:
        """Return the prediction with guidance, (B, C, h, w) float32. strength: None: without guidance"""
        none = torch.zeros(len(noisy), dtype=torch.bool, device=noisy.device)
        with_caption = self._predict(noisy, timesteps, captions, sizes, none)
        if strength is None:
            return with_caption
        without = self._predict(noisy, timesteps, captions, sizes, ~none)
        return self.denoiser.interface.apply_guidance(without, with_caption, strength)

    @torch.no_grad()
    def _predict(
        self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str], sizes: Tensor, dropped: Tensor
    ) -> Tensor:
        return predict(self.denoiser, noisy, timesteps, self.conditions(list(captions), sizes, dropped))


class Distillation(NamedTuple):
    """What a run of distillation has besides that of any training.

    teacher:  gives the targets
    running:  samplings by the student, which it is trained on
    held_out: where samplings by the teacher are; the student is measured there
    images:   of which each batch has some, noised, as in a training on images; None: it has none
    """

    teacher: Teacher
    running: Trajectories | None
    held_out: Batch
    images: Encoded | None


def own_samplings(
    teacher: Teacher,
    noising: Noising,
    data: Encoded,
    shape: tuple[int, ...],
    steps: int,
    guidance: float | None,
    batch_size: int,
    seed: int,
) -> Batch:
    """Return where the teacher's own samplings of some captions are after evenly spread numbers of steps.

    data:     the captions, n of them
    shape:    (C, h, w) of the latents
    steps:    denoising steps of a whole sampling
    guidance: its strength; None: none
    Returns a batch (n, C, h, w), on which a student can be compared with its teacher.
    """
    rng, count = torch.Generator().manual_seed(seed), len(data)
    noise = torch.randn((count, *shape), generator=rng)
    schedule = spaced(noising, steps, torch.full((count, 1), 0.5))
    clean = beginning(noising, noise, schedule[:, 0])
    ends = (torch.arange(count) * steps // count)[torch.randperm(count, generator=rng)]
    device = noising.device
    for step in range(int(ends.max())):
        left = torch.nonzero(ends > step).flatten()
        for rows in left.split(batch_size):
            batch = Batch(clean[rows], noise[rows], schedule[rows, step]).to(device)
            captions, sizes = [data.captions[row] for row in rows], data.sizes[rows]
            noisy = noising.noisy(batch.latents, batch.noise, batch.steps)
            found = teacher.guided(noisy, noising.timesteps(batch.steps), captions, sizes, guidance)
            clean[rows], noise[rows] = (part.cpu() for part in implied(noising, found, batch))
    return Batch(clean, noise, schedule.gather(1, ends[:, None])[:, 0])
