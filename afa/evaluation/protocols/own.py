"""A user's own protocol: a file of prompts, or captioned images in any form that training takes, which are then the references."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np

from afa.errors import UserError
from afa.evaluation.protocols.base import Protocol, Real, Request
from afa.files import given_name
from afa.generation.prompts import read_prompts
from afa.images import read_pixels
from afa.training.pictures import UNREADABLE, reason, unreadable
from afa.training.sources.base import Columns, Sample
from afa.training.sources.table import open_source

STEPS = 50


def protocol(source: Path, request: Request) -> Protocol:
    """50 steps and the family's own guidance unless asked otherwise. Raises UserError if there is nothing to ask for.

    Every reference is decoded here, so that a broken one is left out before anything is drawn.
    """
    sampling = request.sampling(STEPS)
    if source.is_file():
        items = request.items(read_prompts(source))
        metrics = ("imagereward", "clip_t", "aesthetic")
        return Protocol(source.stem, items, sampling, metrics=metrics, scheduler=request.scheduler)
    found = open_source(str(source), Columns(allow_outside=request.allow_outside))
    samples = []
    for sample, error in zip(found.samples, unreadable(found.samples), strict=True):
        if error is None:
            samples.append(sample)
        else:
            found.skipped.add(reason(error), sample.name)
    if len(samples) < 2:
        raise UserError(f"--protocol {source} has {len(samples)} captioned images that can be read; {found.skipped.summary()}")
    items = request.items([sample.caption for sample in samples])
    return Protocol(
        given_name(source),
        items,
        sampling,
        metrics=("fid", "clip_t", "clip_i"),
        scheduler=request.scheduler,
        real=real_images(samples),
        references=[functools.partial(sample_image, samples[item.prompt]) for item in items],
        left_out=found.skipped,
    )


def real_images(samples: list[Sample]) -> Real:
    """Captioned images, read one by one."""
    listed = json.dumps([[sample.name, sample.caption, sample.mark] for sample in samples])
    identity = json.dumps({"images": len(samples), "list": hashlib.sha256(listed.encode()).hexdigest()})
    return Real(identity, lambda: (sample_image(sample) for sample in samples))


def sample_image(sample: Sample) -> np.ndarray:
    """(H, W, 3) uint8. Raises UserError where it cannot be read."""
    try:
        return read_pixels(sample.read(), sample.name)
    except UNREADABLE as error:
        raise UserError(f"image {sample.name} cannot be read ({error}); mend it, or leave it out of the list") from None
