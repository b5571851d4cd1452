"""Drawing the missing images of a run batch by batch, each beside its weight maps."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from tqdm import tqdm

from afa.denoiser.hooks import WeightMaps, record_weights, scale_weights
from afa.denoiser.strengths import Strength
from afa.ensemble import Ensemble
from afa.files import read_arrays, replacing
from afa.generation.prompt_loras import Chosen, PromptLoras
from afa.generation.settings import GenerateSettings
from afa.images import read_made
from afa.prompt_syntax import A1111
from afa.sampling.image_files import ImageFile, draw
from afa.sampling.sample import PipelineSampler, Request, Sampling
from afa.sampling.weighted_prompts import count_chunks


@dataclass(frozen=True)
class Drawing:
    """Images that are drawn with the same options.

    settings: of the images
    sampling: how they are sampled
    sampler:  what draws them
    images:   all of them, in order
    regions:  strengths in parts of the pictures and of the steps
    """

    settings: GenerateSettings
    sampling: Sampling
    sampler: Any
    images: list[ImageFile]
    regions: Sequence[Strength] = ()


def deal(drawings: Sequence[Drawing], part: int, parts: int) -> list[Drawing]:
    """Return one of several equal parts of the images, counted over all drawings. part: from 0"""
    dealt, count = [], 0
    for drawing in drawings:
        dealt.append(replace(drawing, images=drawing.images[(part - count) % parts :: parts]))
        count += len(drawing.images)
    return dealt


def draw_missing(drawing: Drawing, ensemble: Ensemble, loras: PromptLoras, bar: "tqdm[Any]") -> None:
    """Draw the missing images batch by batch, with scaled and recorded weights if they are asked for.

    bar: of progress, one step an image
    """
    settings, sampler = drawing.settings, drawing.sampler
    missing = [
        image
        for image in drawing.images
        if image.found() is None or (settings.weights and not _weights_made(image.path))
    ]
    PartialState().wait_for_everyone()  # all processes look before one writes
    saves = settings.parallel is None or PartialState().is_main_process
    paths: dict[Request, Path] = {}

    def hooked(requests: Sequence[Request], sampling: Sampling) -> NDArray[np.uint8]:
        with contextlib.ExitStack() as hooks:
            if settings.weights:
                maps = hooks.enter_context(record_weights(sampler.denoiser))
            if settings.strength or drawing.regions:
                scheduler = sampler.pipeline.scheduler
                hooks.enter_context(
                    scale_weights(sampler.denoiser, settings.strengths(), drawing.regions, scheduler)
                )
            drawn: NDArray[np.uint8] = sampler(requests, sampling)
        for index, request in enumerate(requests if settings.weights and saves else ()):
            _save_weights(paths[request], drawn[index], maps, index, len(requests))
        return drawn

    bar.update(len(drawing.images) - len(missing))
    for chosen, images in _alike(missing, drawing, loras):
        loras.activate(ensemble, chosen)
        paths = {image.request: image.path for image in images}
        draw(images, hooked, drawing.sampling, settings.batch_size, bar, saves=saves)


def _alike(
    images: Sequence[ImageFile], drawing: Drawing, loras: PromptLoras
) -> Iterator[tuple[Chosen, list[ImageFile]]]:
    """Yield images that can be in one batch, with the LoRAs of their prompts.

    They have the same LoRAs. With weights in prompts, they also have the same number of chunks of text.
    """
    counts = [0] * len(images)
    if drawing.sampling.prompt_syntax == A1111 and isinstance(drawing.sampler, PipelineSampler):
        counts = count_chunks(drawing.sampler.pipeline, [image.request.prompt for image in images])
    groups: dict[tuple[Chosen, int], list[ImageFile]] = {}
    for image, count in zip(images, counts, strict=True):
        groups.setdefault((loras.chosen.get(image.facts["prompt"], ()), count), []).append(image)
    for (chosen, _), alike in groups.items():
        yield chosen, alike


def _weights_made(path: Path) -> bool:
    """Return whether the weight maps of an image and their picture exist and are complete."""
    arrays = read_arrays(path.with_suffix(".weights.npz"))
    return arrays is not None and read_made(path.with_suffix(".weights.png")) is not None


def _save_weights(path: Path, image: NDArray[np.uint8], maps: WeightMaps, index: int, batch: int) -> None:
    """Save the weight maps of one image, and a picture of them.

    The .npz holds STAGE: (passes, N, h, w) float16, and timesteps: (passes,).
    """
    from afa.pictures import conditional, picture

    own = [{name: weights[index] for name, weights in one.items()} for one in conditional(maps, batch)]
    arrays = {name: torch.stack([one[name] for one in own]).half().numpy() for name in own[0]}
    with replacing(path.with_suffix(".weights.npz")) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, timesteps=np.asarray(maps.timesteps, np.float32), experts=np.asarray(maps.experts), **arrays
        )
    with replacing(path.with_suffix(".weights.png")) as temporary:
        picture(image, own, maps.experts, maps.timesteps).save(temporary, format="PNG")
