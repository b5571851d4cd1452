"""coco2017: captions of COCO's training images at 256 px; FID and IS over all pairs, CLIP scores over the first 5,000.

Source: arXiv:2405.17082, section 4.1 (118,287 pairs of COCO 2017, one caption an image). Deviation: the paper does not say
which of an image's five captions; here the first by annotation id.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from afa.errors import UserError
from afa.evaluation.protocols.base import Protocol, Real, Request
from afa.files import sha256
from afa.images import open_image, read_pixels
from afa.text_files import read_bytes, read_json
from afa.training.pictures import unreadable
from afa.training.sources.base import NO_FILE, LeftOutError, Sample, find_file

SIDE, STEPS = 256, 50
CLIP_PAIRS = 5_000
ANNOTATIONS, IMAGES = "annotations/captions_train2017.json", "train2017"
HOLDS = f"a folder with COCO 2017's {ANNOTATIONS} and {IMAGES}/"


def protocol(request: Request) -> Protocol:
    """--prompts pairs (all 118,287 by default). Raises UserError if COCO is not at --protocol-data."""
    root = request.data_folder("coco2017", HOLDS)
    pairs = read_pairs(root, inside=not request.allow_outside)[: request.prompts]
    check_images([path for path, _ in pairs])
    items = request.items([caption for _, caption in pairs])
    paths = [path for path, _ in pairs]
    identity = json.dumps({"coco2017": len(paths), "annotations": sha256(root / ANNOTATIONS), "side": SIDE})
    return Protocol(
        "coco2017",
        items,
        request.sampling(STEPS, side=SIDE),
        metrics=("fid", "inception_score", "clip_i", "clip_t"),
        scheduler=request.scheduler,
        first={"clip_i": CLIP_PAIRS, "clip_t": CLIP_PAIRS},
        real=Real(identity, lambda: (square(path) for path in paths)),
        references=[functools.partial(read_pixels, paths[item.prompt]) for item in items],
    )


def read_pairs(root: Path, inside: bool = True) -> list[tuple[Path, str]]:
    """Image and first caption, by image id. inside: images must lie in their folder, links followed.

    Raises UserError if files are missing or not COCO's.
    """
    file = root / ANNOTATIONS
    if not file.is_file() or not (root / IMAGES).is_dir():
        raise UserError(f"--protocol-data {root} is not {HOLDS}")
    found = read_json(file)
    try:
        names = {entry["id"]: entry["file_name"] for entry in found["images"]}
        captions: dict[int, str] = {}
        for entry in sorted(found["annotations"], key=lambda entry: int(entry["id"])):
            captions.setdefault(entry["image_id"], entry["caption"].strip())
        listed = [(str(names[image]), captions[image]) for image in sorted(names) if image in captions]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not COCO's file of captions ({error!r}); download it again") from None
    pairs = []
    for name, caption in listed:
        try:
            pairs.append((find_file(name, root / IMAGES, [(root / IMAGES).resolve()] if inside else None), caption))
        except LeftOutError as reason:
            what = "missing" if str(reason) == NO_FILE else reason
            sentence = f"{root / IMAGES / name} is {what}, which {file.name} names; unpack COCO's images again"
            raise UserError(sentence) from None
    return pairs


def check_images(paths: Sequence[Path]) -> None:
    """Raises UserError, naming the first, if images cannot be read."""
    samples = [Sample(str(path), "", "", functools.partial(read_bytes, path)) for path in paths]
    broken = [error for error in unreadable(samples) if error is not None]
    if broken:
        raise UserError(f"{len(broken)} of COCO's {len(paths)} images cannot be used, the first: {broken[0]}; unpack them again")


def square(path: Path) -> np.ndarray:
    """The centre of an image, its shorter side resized to 256 (bicubic, antialiased): (256, 256, 3) uint8."""
    rgb = open_image(path)
    scale = SIDE / min(rgb.size)
    rgb = rgb.resize((max(SIDE, round(rgb.width * scale)), max(SIDE, round(rgb.height * scale))), Image.Resampling.BICUBIC)
    left, top = (rgb.width - SIDE) // 2, (rgb.height - SIDE) // 2
    return np.asarray(rgb.crop((left, top, left + SIDE, top + SIDE)))
