"""How long a step takes on this machine: a few real ones, on random latents, before any data are read."""

import functools
import time
from collections.abc import Callable

import torch

from afa.devices import choose_device
from afa.training.conditions import Conditions
from afa.training.noise import Batch
from afa.training.objectives.base import Pass, Total
from afa.training.objectives.table import make_means, make_objectives
from afa.training.plan import Plan
from afa.training.prepare import noising_of


def rehearse(planned: Plan) -> tuple[float, float]:
    """-> seconds of an optimiser step on one process, seconds of a measurement of the held-out images."""
    settings, ensemble = planned.settings, planned.ensemble
    device = choose_device(settings.device)
    ensemble.to(device)
    if settings.gradient_checkpointing:
        ensemble.denoiser.enable_gradient_checkpointing()
    vae = ensemble.frame.vae.to(device)
    noising = noising_of(settings, ensemble, device)
    means = make_means(settings, noising, vae, device, settings.gradient_checkpointing)
    parameters = list(ensemble.aggregators.parameters())
    objectives = make_objectives(means, parameters)
    conditions = Conditions(ensemble.pipeline(), ensemble.denoiser, device)
    side = planned.resolution // noising.latents.factor

    def work(total: Total) -> torch.Tensor:
        latents = torch.randn(settings.batch_size, noising.latents.channels, side, side, device=device)
        spare = torch.randn(len(latents), total.spare, *latents.shape[1:], device=device) if total.spare else None
        batch = Batch(latents, torch.randn_like(latents), torch.randint(noising.steps, (len(latents),), device=device), spare)
        captions = [sample.caption for sample in planned.source.samples[: len(latents)]]
        captions += captions[:1] * (len(latents) - len(captions))
        encode = functools.partial(conditions, captions, torch.full((len(latents), 6), float(planned.resolution)))
        none = torch.zeros(len(latents), dtype=torch.bool, device=device)
        one = Pass(ensemble.denoiser, ensemble.denoiser, noising, batch, captions, none, encode)
        return total.sum(total.losses(one)).mean()

    def step() -> None:
        torch.autograd.grad(work(objectives.training), parameters, allow_unused=True)

    @torch.no_grad()
    def measure() -> None:
        work(objectives.held_out)

    held_out = min(settings.held_out, len(planned.source.samples) // 5)
    return _seconds(step, device) * settings.accumulate, _seconds(measure, device) * -(-held_out // settings.batch_size)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Of the second time: the first makes buffers and chooses kernels."""
    work()
    _wait(device)
    started = time.monotonic()
    work()
    _wait(device)
    return time.monotonic() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
