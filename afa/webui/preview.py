"""Previews while a picture is drawn: a linear map from latents to colours, fitted to the frame's own VAE."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from afa.denoiser.schedule import FLOW, Schedule, clean_of, is_edm
from afa.errors import UserError
from afa.latents import latents_of
from afa.models.registry import interface_of
from afa.sampling.sample import Sampling, image_size

PICTURES, SIDE = 16, 16  # pictures that the map is fitted to, and the side of their latents
EVERY = 0.4  # seconds between previews at least, so that fast steps are not slowed down
Show = Callable[[NDArray[np.uint8]], None]


@functools.lru_cache(maxsize=4)
def colour_map(vae: Any) -> Tensor:
    """Fit RGB from -1 to 1 to scaled latents by least squares: (C + 1, 3), the last row is constant.

    vae: of the frame; it encodes flat and quartered pictures of random colours. What it decodes from random
         latents would not do: these are no latents of pictures, and give wrong colours
    Raises UserError for a VAE of an unknown class.
    """
    latents, parameter = latents_of(vae), next(vae.parameters())
    noise, size = torch.Generator().manual_seed(0), SIDE * latents.factor
    coarse = [torch.rand(1, 3, 1 + index % 2, 1 + index % 2, generator=noise) for index in range(PICTURES)]
    images = torch.cat([functional.interpolate(2 * one - 1, (size, size), mode="nearest") for one in coarse])
    with torch.no_grad():
        moments = latents.moments(vae, images.to(parameter)).float().cpu()
    scaled = latents.scaled(moments[:, : latents.channels])
    colours = functional.interpolate(images, scaled.shape[-2:], mode="area")
    rows = scaled.permute(0, 2, 3, 1).reshape(-1, scaled.shape[1])
    wanted = colours.permute(0, 2, 3, 1).reshape(-1, 3)
    solution: Tensor = torch.linalg.lstsq(functional.pad(rows, (0, 1), value=1.0), wanted).solution
    return solution


def preview(clean: Tensor, colours: Tensor) -> NDArray[np.uint8]:
    """Return a small picture of scaled latents (C, h, w): (h, w, 3) uint8. colours: of colour_map"""
    rows = clean.float().cpu().permute(1, 2, 0)
    shown = (rows @ colours[:-1] + colours[-1]).clamp(-1, 1)
    return np.asarray(((shown + 1) * 127.5).round().to(torch.uint8).numpy())


@contextmanager
def previewed(pipeline: Any, sampling: Sampling, show: Show) -> Iterator[None]:
    """Inside the context, call `show` with a preview of the first image's predicted end, every EVERY seconds.

    pipeline: of a sampler, or None. With EDM's schedules, and where a method steps with other predictions
              than the model's (SuperDiff), nothing is shown
    sampling: what the pipeline is asked for; packed latents do not tell their height and width
    The drawing is the same, bit for bit.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    try:
        if scheduler is None or is_edm(scheduler):
            raise UserError("there are no predictions to show")
        schedule, colours = Schedule.of(scheduler), colour_map(pipeline.vae)
    except UserError:  # a preview is no part of the picture, which may well be drawn without
        yield
        return
    step, shown_at = scheduler.step, 0.0
    exploding = schedule.kind != FLOW and float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1.01
    interface, channels = interface_of(pipeline)[0], len(colours) - 1
    asked = [side // pipeline.vae_scale_factor for side in image_size(pipeline, sampling)]

    @functools.wraps(step)  # pipelines look at its arguments
    def watched(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal shown_at
        height, width = sample.shape[2:] if sample.ndim == 4 else asked
        fits = prediction[0].numel() == sample[0].numel() == channels * height * width
        if fits and time.monotonic() - shown_at >= EVERY:
            signal, noise = (float(level) for level in schedule.at(torch.as_tensor(timestep).cpu()))
            answer, noisy = (
                interface.stepped_to_latents(one[:1], (height, width))[0] for one in (prediction, sample)
            )
            noisy = noisy * signal if exploding else noisy
            show(preview(clean_of(schedule.kind, answer, noisy, signal, noise), colours))
            shown_at = time.monotonic()
        return step(prediction, timestep, sample, *args, **kwargs)

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step
