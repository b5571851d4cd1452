"""coco2017: captions of COCO's training images at 256 px; FID and IS over all pairs, CLIP scores over the first 5,000.

Source: arXiv:2405.17082, section 4.1 (118,287 pairs of COCO 2017, one caption an image). Deviation: the paper does not say
which of an image's five captions; here the first by annotation id.
"""

import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from afa.errors import UserError
from afa.evaluation.protocols.base import Protocol, Real, Request
from afa.files import sha256

SIDE, STEPS = 256, 50
CLIP_PAIRS = 5_000
ANNOTATIONS, IMAGES = "annotations/captions_train2017.json", "train2017"
HOLDS = f"a folder with COCO 2017's {ANNOTATIONS} and {IMAGES}/"


def protocol(request: Request) -> Protocol:
    """--prompts pairs (all 118,287 by default). Raises UserError if COCO is not at --protocol-data."""
    root = request.data_folder("coco2017", HOLDS)
    pairs = read_pairs(root)[: request.prompts]
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
        references=[functools.partial(read_image, paths[item.prompt]) for item in items],
    )


def read_pairs(root: Path) -> list[tuple[Path, str]]:
    """Image and first caption, by image id. Raises UserError if files are missing or not COCO's."""
    file = root / ANNOTATIONS
    if not file.is_file() or not (root / IMAGES).is_dir():
        raise UserError(f"--protocol-data {root} is not {HOLDS}")
    try:
        found = json.loads(file.read_text())
        names = {entry["id"]: entry["file_name"] for entry in found["images"]}
        captions: dict[int, str] = {}
        for entry in sorted(found["annotations"], key=lambda entry: int(entry["id"])):
            captions.setdefault(entry["image_id"], entry["caption"].strip())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not COCO's file of captions ({error!r}); download it again") from None
    pairs = [(root / IMAGES / names[image], captions[image]) for image in sorted(names) if image in captions]
    missing = next((path for path, _ in pairs if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing} is missing, which {file.name} names; unpack COCO's images again")
    return pairs


def square(path: Path) -> np.ndarray:
    """The centre of an image, its shorter side resized to 256 (bicubic, antialiased): (256, 256, 3) uint8."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    scale = SIDE / min(rgb.size)
    rgb = rgb.resize((max(SIDE, round(rgb.width * scale)), max(SIDE, round(rgb.height * scale))), Image.Resampling.BICUBIC)
    left, top = (rgb.width - SIDE) // 2, (rgb.height - SIDE) // 2
    return np.asarray(rgb.crop((left, top, left + SIDE, top + SIDE)))


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
