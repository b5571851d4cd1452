"""The training set: images and captions in a folder, read once, kept as the VAE's latents."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from afa.errors import UserError

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Example:
    """One captioned image."""

    path: Path
    text: str


@dataclass
class Folder:
    """What a data folder holds: examples, and what had to be left out, by reason."""

    examples: list[Example]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: what there is, what was left out."""
        reasons = [f"{len(names)} left out: {reason} ({names[0]}{', …' if len(names) > 1 else ''})" for reason, names in self.skipped.items()]
        return "; ".join([f"{len(self.examples)} captioned images", *reasons])


def read_folder(folder: Path) -> Folder:
    """Read metadata.jsonl and open every image's header. Raises UserError if nothing usable is there."""
    file = folder / METADATA
    if not folder.is_dir():
        raise UserError(f"--data {folder} is no folder; give one with images and a {METADATA}")
    if not file.is_file():
        raise UserError(f'{folder} has no {METADATA}; write one line {{"file_name": "a.png", "text": "caption"}} per image')
    found = Folder([])
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            _sort(_entry(line, file, number), folder, found)
    if not found.examples:
        raise UserError(f"{folder} has no image to train on: {found.summary()}")
    return found


def _entry(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}, line {number} is not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise UserError(f'{file}, line {number} has no "file_name"; expected {{"file_name": "a.png", "text": "caption"}}')
    return entry


def _sort(entry: dict[str, Any], folder: Path, found: Folder) -> None:
    """Put one line among the examples, or among the skipped with its reason."""
    path, text = folder / entry["file_name"], entry.get("text")
    if not isinstance(text, str) or not text.strip():
        reason = "no caption"
    elif not path.is_file():
        reason = "no such file"
    elif not _readable(path):
        reason = "not readable as an image"
    else:
        found.examples.append(Example(path, text.strip()))
        return
    found.skipped.setdefault(reason, []).append(entry["file_name"])


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # PIL raises SyntaxError for a broken PNG
        return False
    return True


def split(examples: list[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """-> training examples, held-out examples: `held_out` of them, at most a fifth. Raises UserError for fewer than five."""
    if len(examples) < 5:
        raise UserError(f"{len(examples)} captioned images are too few to train on; at least 5 are needed, a fifth of them held out")
    order = np.random.default_rng(seed).permutation(len(examples))
    count = min(held_out, len(examples) // 5)
    return [examples[index] for index in sorted(order[count:])], [examples[index] for index in sorted(order[:count])]


@dataclass(frozen=True)
class Encoded:
    """Examples as the experts see them: moments (n, 2C, h, w) of the VAE's posterior, captions, SDXL's size conditions (n, 6)."""

    moments: Tensor
    captions: list[str]
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.captions)


def encode(examples: list[Example], resolution: int, vae: Any, batch_size: int, progress: Any = iter) -> Encoded:
    """Encode every image once. progress: wraps the iteration, e.g. in a bar."""
    moments, sizes = [], []
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    for batch in progress(list(_batches(examples, batch_size))):
        pixels, conditions = zip(*(_load(example, resolution) for example in batch), strict=True)
        with torch.no_grad():
            posterior = vae.encode(torch.stack(pixels).to(device, dtype)).latent_dist
        moments.append(posterior.parameters.float().cpu())
        sizes.extend(conditions)
    return Encoded(torch.cat(moments), [example.text for example in examples], torch.tensor(sizes))


def _batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _load(example: Example, resolution: int) -> tuple[Tensor, tuple[float, ...]]:
    """An image's centre square: (3, R, R) in [-1, 1], and (height, width, top, left, R, R) as SDXL is told of it."""
    with Image.open(example.path) as opened:
        image = opened.convert("RGB")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    original = (float(image.height), float(image.width))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (*original, float(top), float(left), float(resolution), float(resolution))
