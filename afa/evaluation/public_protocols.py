"""Public protocols: COCO 2017 captions and DrawBench.

coco2017: captions of COCO's training images at 256 px. FID and IS use all pairs, CLIP scores the first 5,000.
Source: arXiv:2405.17082, section 4.1 (118,287 pairs of COCO 2017, one caption an image). Deviation: the paper
does not say which of an image's five captions it takes; here it is the first by annotation id.

drawbench: the 200 prompts of DrawBench, four images each. The prompts are published as a table of Prompts and
Category. They are not shipped here: give the file with --protocol-data.
Source: Saharia et al., arXiv:2205.11487.
"""

import csv
import functools
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from afa.data.images import unreadable
from afa.data.sources import NO_FILE, LeftOutError, Sample, find_file
from afa.errors import UserError
from afa.evaluation.protocols import Protocol, ProtocolOptions, Real
from afa.files import sha256
from afa.images import open_image, read_pixels
from afa.text_files import read_bytes, read_json, read_json_lines, read_text

SIDE, COCO_STEPS = 256, 50
CLIP_PAIRS = 5_000
ANNOTATIONS, IMAGES = "annotations/captions_train2017.json", "train2017"
COCO_HOLDS = f"a folder with COCO 2017's {ANNOTATIONS} and {IMAGES}/"


def coco2017(request: ProtocolOptions) -> Protocol:
    """Make the protocol of the first --prompts pairs (default: all 118,287).

    Raises UserError if COCO is not at --protocol-data, or images cannot be read.
    """
    root = request.data_folder("coco2017", COCO_HOLDS)
    pairs = read_pairs(root, inside=not request.allow_outside)[: request.prompts]
    paths = [path for path, _ in pairs]
    samples = [Sample(str(path), "", "", functools.partial(read_bytes, path)) for path in paths]
    broken = [error for error in unreadable(samples) if error is not None]
    if broken:
        raise UserError(
            f"{len(broken)} of COCO's {len(paths)} images cannot be used, the first: {broken[0]}; "
            "unpack them again"
        )
    items = request.items([caption for _, caption in pairs])
    identity = json.dumps({"coco2017": len(paths), "annotations": sha256(root / ANNOTATIONS), "side": SIDE})
    return Protocol(
        "coco2017",
        items,
        request.sampling(COCO_STEPS, side=SIDE),
        metrics=("fid", "inception_score", "clip_i", "clip_t"),
        scheduler=request.scheduler,
        first={"clip_i": CLIP_PAIRS, "clip_t": CLIP_PAIRS},
        real=Real(identity, lambda: (square(path) for path in paths)),
        references=[functools.partial(read_pixels, paths[item.prompt]) for item in items],
    )


def read_pairs(root: Path, inside: bool = True) -> list[tuple[Path, str]]:
    """Return (image, first caption) by image id.

    inside: images must lie in their folder, after links are followed

    Raises UserError if files are missing or not COCO's.
    """
    file = root / ANNOTATIONS
    if not file.is_file() or not (root / IMAGES).is_dir():
        raise UserError(f"--protocol-data {root} is not {COCO_HOLDS}")
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
            pairs.append(
                (find_file(name, root / IMAGES, [(root / IMAGES).resolve()] if inside else None), caption)
            )
        except LeftOutError as reason:
            what = "missing" if str(reason) == NO_FILE else reason
            sentence = (
                f"{root / IMAGES / name} is {what}, which {file.name} names; unpack COCO's images again"
            )
            raise UserError(sentence) from None
    return pairs


def square(path: Path) -> np.ndarray:
    """Return the centre of an image, its shorter side resized to 256 (bicubic, antialiased).

    Returns (256, 256, 3) uint8.
    """
    rgb = open_image(path)
    scale = SIDE / min(rgb.size)
    rgb = rgb.resize(
        (max(SIDE, round(rgb.width * scale)), max(SIDE, round(rgb.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (rgb.width - SIDE) // 2, (rgb.height - SIDE) // 2
    return np.asarray(rgb.crop((left, top, left + SIDE, top + SIDE)))


PROMPTS, COPIES, DRAWBENCH_STEPS = 200, 4, 50
DRAWBENCH_HOLDS = "DrawBench's table of 200 prompts (.csv, .tsv or .jsonl with a column Prompts)"


def drawbench(request: ProtocolOptions) -> Protocol:
    """Make the protocol of 200 prompts × 4 images. Raises UserError for a file without these prompts."""
    path = request.data_folder("drawbench", DRAWBENCH_HOLDS)
    captions = read_table(path)
    if len(captions) != PROMPTS:
        found = f"{len(captions)} {'prompt' if len(captions) == 1 else 'prompts'}"
        raise UserError(
            f"{path} holds {found}, DrawBench has {PROMPTS}; "
            "for prompts of your own give the file as --protocol"
        )
    metrics = ("imagereward", "pickscore", "hpsv2", "aesthetic")
    return Protocol(
        "drawbench",
        request.items(captions, COPIES),
        request.sampling(DRAWBENCH_STEPS),
        metrics,
        request.scheduler,
    )


def read_table(path: Path) -> list[str]:
    """Return the column Prompts (or prompt) of a table, in its order. Raises UserError if there is none."""
    try:
        if path.suffix == ".jsonl":
            rows = [row for _, row in read_json_lines(path)]
        else:
            lines = io.StringIO(read_text(path), newline="")
            rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
        names = [name for name in ("Prompts", "prompts", "Prompt", "prompt") if rows and name in rows[0]]
        return [str(row[names[0]]).strip() for row in rows if str(row[names[0]] or "").strip()]
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not {DRAWBENCH_HOLDS} ({error!r})") from None
