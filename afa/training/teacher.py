"""The teacher of a distillation: an ensemble, or a method that combines its experts while sampling."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from afa.ensemble import Ensemble
from afa.sampling.base import Combination
from afa.sampling.registry import make_sampler, read_options
from afa.sampling.sample import PipelineSampler
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
    method:   answers in place of the ensemble, see teaching_method; None: the ensemble does
    Source of guidance in one pass: Meng et al., arXiv:2210.03142, here at one fixed strength.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        device: torch.device,
        guidance: float | None = None,
        method: PipelineSampler | None = None,
    ) -> None:
        self.denoiser, self.guidance = ensemble.denoiser.eval().requires_grad_(False), guidance
        self.conditions = Conditions(ensemble.pipeline(), self.denoiser, device)
        self.answering = self.denoiser if method is None else method.denoiser
        self.at_once = not isinstance(self.answering, Combination)  # latents at several timesteps in one pass
        self.in_pairs = method is not None and bool(method.guided)  # only in passes with and without caption

    def __call__(self, work: Pass) -> Tensor:
        """Return the target of the samples that it is asked for, (n, C, h, w) float32."""
        assert work.sizes is not None
        asked = slice(work.asked)
        given = (work.noisy[asked], work.timesteps[asked], work.captions[asked], work.sizes[asked])
        if self.guidance is not None:
            return self.guided(*given, self.guidance)
        dropped = work.dropped[asked]
        if not self.in_pairs:
            return self._predict(*given, dropped)
        noisy, pairs = given[0], slice(None, None, 2)
        if dropped[1::2].all() and not dropped[pairs].any() and torch.equal(noisy[pairs], noisy[1::2]):
            without, prompted = self._both(*(part[pairs] for part in given))
            return torch.stack([prompted, without], 1).flatten(0, 1)
        without, prompted = self._both(*given)
        return torch.where(dropped.view(-1, 1, 1, 1), without, prompted)

    def guided(
        self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str], sizes: Tensor, strength: float | None
    ) -> Tensor:
        """Return the prediction with guidance, (B, C, h, w) float32. strength: None: without guidance"""
        if strength is None:
            none = torch.zeros(len(noisy), dtype=torch.bool, device=noisy.device)
            return self._predict(noisy, timesteps, captions, sizes, none)
        without, prompted = self._both(noisy, timesteps, captions, sizes)
        return self.denoiser.interface.apply_guidance(without, prompted, strength)

    def _both(
        self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str], sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the predictions without and with caption, each (B, C, h, w) float32."""
        none = torch.zeros(len(noisy), dtype=torch.bool, device=noisy.device)
        if not self.in_pairs:
            given = (noisy, timesteps, captions, sizes)
            prompted = self._predict(*given, none)
            return self._predict(*given, ~none), prompted
        answers = torch.empty(2, *noisy.shape, device=noisy.device)
        interface = self.denoiser.interface
        for rows in _at_one_time(timesteps):
            words = [captions[row] for row in rows] * 2
            dropped = interface.join_guidance(~none[rows], none[rows])
            given = (part[rows].repeat(2, *[1] * (part.ndim - 1)) for part in (noisy, timesteps, sizes))
            latents, times, twice = given
            both = self._answer(latents, times, words, twice, dropped)
            answers[:, rows] = torch.stack(interface.split_guidance(both))
        return answers[0], answers[1]

    def _predict(
        self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str], sizes: Tensor, dropped: Tensor
    ) -> Tensor:
        """Return the predictions, each with its caption or without it, (B, C, h, w) float32."""
        if self.at_once:
            return self._answer(noisy, timesteps, captions, sizes, dropped)
        answers = torch.empty(noisy.shape, device=noisy.device)
        for rows in _at_one_time(timesteps):
            words = [captions[row] for row in rows]
            answers[rows] = self._answer(noisy[rows], timesteps[rows], words, sizes[rows], dropped[rows])
        return answers

    @torch.no_grad()
    def _answer(
        self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str], sizes: Tensor, dropped: Tensor
    ) -> Tensor:
        conditions = self.conditions(list(captions), sizes, dropped)
        return predict(self.denoiser, noisy, timesteps, conditions, self.answering)


def _at_one_time(timesteps: Tensor) -> list[Tensor]:
    """Return the rows of each timestep, as methods that weigh experts by it need them."""
    return [torch.nonzero(timesteps == time).flatten() for time in timesteps.unique()]


def teaching_method(ensemble: Ensemble, settings: Any, strength: float | None) -> PipelineSampler:
    """Return the sampling-time method of a run's settings, which answers with the ensemble's experts.

    strength: of the guidance of the student's samplings, or of that which it learns; None: none
    Raises UserError for options that do not fit the experts, and a method that needs guidance without it.
    """
    options = asdict(read_options(settings.method, settings.method_option or []))
    sampler = make_sampler(settings.method, ensemble, **options)
    for part in sampler.guided:
        part.guidance = 1.0 if strength is None else strength
    return cast(PipelineSampler, sampler)


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
