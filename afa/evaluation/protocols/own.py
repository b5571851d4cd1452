"""A user's own protocol: a file of prompts, or a folder of captioned images, whose images are then the references."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from afa.evaluation.protocols.base import Protocol, Real, Request
from afa.experts.hashing import sha256
from afa.generation.prompts import read_prompts
from afa.training.data import METADATA, read_folder

STEPS, GUIDANCE = 50, 7.5


def protocol(source: Path, request: Request) -> Protocol:
    """50 steps and guidance 7.5 unless asked otherwise. Raises UserError if there is nothing to ask for."""
    sampling = request.sampling(STEPS, GUIDANCE)
    if source.is_file():
        items = request.items(read_prompts(source))
        return Protocol(source.stem, items, sampling, metrics=("imagereward", "clip_t", "aesthetic"), scheduler=request.scheduler)
    examples = read_folder(source).examples
    items = request.items([example.text for example in examples])
    return Protocol(
        source.resolve().name,
        items,
        sampling,
        metrics=("fid", "clip_t", "clip_i"),
        scheduler=request.scheduler,
        real=real_images([example.path for example in examples], sha256(source / METADATA)),
        references=[examples[item.prompt].path for item in items],
    )


def real_images(paths: list[Path], digest: str) -> Real:
    """Images of a folder, read one by one; digest: of the list that names them."""
    identity = json.dumps({"images": len(paths), "list": digest})
    return Real(identity, lambda: (read_image(path) for path in paths))


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
