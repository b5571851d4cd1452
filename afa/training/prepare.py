"""Prepare a run's data: find, size and encode it, or read it from a cache."""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from afa.data.images import Crop
from afa.data.registry import open_source
from afa.data.sources import Columns, ImageSource
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.latents import latents_of
from afa.training.cache import LatentCache, announce, encode_cached, missing_rows
from afa.training.data import Augmentation, Encoded, Work, check_skipped, encode, split
from afa.training.objective_terms import make_context, make_objectives
from afa.training.reward_objectives import is_small
from afa.training.settings import LoopSettings
from afa.training.sheets import make_watch

MISSES = 1000  # in a row, after which no more captions are expected
FEW = 50  # images, encoded without a bar


def find_data(settings: LoopSettings) -> ImageSource:
    """List the data without reading images.

    Raises UserError if there are too few images, or too many cannot be used.
    """
    columns = Columns(settings.image_column, settings.caption_column, settings.allow_outside)
    source = open_source(settings.data, columns, settings.limit)
    check_skipped(source, settings.max_skipped)
    split(source.samples, settings.held_out, settings.seed)  # raises where there are too few
    return source


def resolution_of(settings: LoopSettings, ensemble: Ensemble) -> int:
    """Return the resolution in pixels.

    It is a multiple of the VAE's factor and of a transformer's patches; raises UserError otherwise.
    """
    factor = latents_of(ensemble.frame.vae).factor
    denoiser = ensemble.denoiser
    if not settings.resolution and not denoiser.side:
        raise UserError(f"'{denoiser.names[0]}' has no size of its own (sample_size); give --resolution")
    resolution = settings.resolution or denoiser.side * factor
    multiple = factor * denoiser.interface.patch
    if resolution % multiple:
        what = (
            "the VAE's down-sampling factor"
            if multiple == factor
            else f"{factor} of the VAE times patches of {denoiser.interface.patch}"
        )
        raise UserError(f"--resolution {resolution} is not a multiple of {multiple}, {what}")
    return resolution


def check_objective(settings: LoopSettings, ensemble: Ensemble, source: ImageSource) -> None:
    """Raise UserError for what would fail after the data are encoded: schedule, weighting, reward models."""
    cpu = torch.device("cpu")
    context = make_context(settings, ensemble, cpu)
    make_objectives(context, [])
    make_watch(settings, cpu)
    if context.reward is not None and is_small(settings.reward):
        side = resolution_of(settings, ensemble)
        context.reward(torch.zeros(1, 3, side, side, requires_grad=True), [source.samples[0].caption])


def encode_data(
    settings: LoopSettings, source: ImageSource, resolution: int, vae: Any, held_out_too: bool = True
) -> list[Encoded]:
    """Return the encoded training set and, unless it is left out, the held-out set.

    Unreadable images are left out and reported. Raises UserError if there are too many.
    """
    training, held_out = split(list(enumerate(source.samples)), settings.held_out, settings.seed)
    augmentation = Augmentation(settings.crops, settings.flip)
    parts: list[list[Work]] = [
        [(sample, augmentation.of(resolution, settings.seed, index)) for index, sample in training]
    ]
    if held_out_too:
        parts.append([(sample, [Crop(resolution)]) for _, sample in held_out])
    encoder: Callable[..., Encoded] = (
        encode if settings.cache is None else _caching(Path(settings.cache), parts, resolution, vae)
    )
    found = [
        encoder(
            part,
            vae,
            settings.batch_size,
            source.skipped,
            functools.partial(_watched, source, settings.max_skipped, len(part)),
        )
        for part in parts
    ]
    check_skipped(source, settings.max_skipped)
    if source.skipped and PartialState().is_main_process:
        print(f"afa: {source.skipped.summary()}", file=sys.stderr)
    return found


def recombined(captions: Sequence[str], count: int, others: Sequence[str], seed: int) -> list[str]:
    """Return new captions, each the beginning of one caption and the end of another, joined at a common word.

    count:  how many; fewer where no more are found
    others: captions that must not come out
    """
    rng, made = np.random.default_rng((seed, 3)), dict.fromkeys([*captions, *others])
    known, texts = len(made), [caption.split() for caption in captions]
    places: dict[str, list[tuple[int, int]]] = {}
    for number, words in enumerate(texts):
        for place, word in enumerate(words[:-1]):
            places.setdefault(word, []).append((number, place))
    joints = [word for words in texts for word in words[:-1] if len(places[word]) > 1]
    misses = 0 if joints else MISSES
    while len(made) < known + count and misses < MISSES:
        before = len(made)
        word = joints[rng.integers(len(joints))]
        (one, first), (other, second) = (places[word][rng.integers(len(places[word]))] for _ in range(2))
        made.setdefault(" ".join([*texts[one][: first + 1], *texts[other][second + 1 :]]))
        misses = misses + 1 if len(made) == before else 0
    return list(made)[known:]


def encode_captions(
    settings: LoopSettings, source: ImageSource, resolution: int, least: int
) -> tuple[Encoded, Encoded]:
    """Return the training captions and the held-out captions of a run without images.

    least: of the first there are as many, if they can be recombined
    """
    sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], dtype=torch.float32)
    training, held_out = split(
        [sample.caption for sample in source.samples], settings.held_out, settings.seed
    )
    training += recombined(training, least - len(training), held_out, settings.seed)
    found = []
    for part in (training, held_out):
        digest = hashlib.sha256("\0".join(part).encode()).hexdigest()
        found.append(Encoded(torch.empty(len(part), 0), part, sizes.repeat(len(part), 1), digest))
    return found[0], found[1]


def _caching(folder: Path, parts: list[list[Work]], resolution: int, vae: Any) -> Callable[..., Encoded]:
    """Return an encoder that stores its results in a folder. It announces what will be written."""
    latents = latents_of(vae)
    side = resolution // latents.factor
    cache = LatentCache(folder, vae, (2 * latents.channels, side, side))
    missing = sum(missing_rows(part, cache) for part in parts)
    announce(folder, "images", missing, cache.moments.row_bytes + cache.sizes.row_bytes)
    return functools.partial(encode_cached, cache=cache)


def _watched(source: ImageSource, share: float, total: int, images: Iterable[Any]) -> Iterator[Any]:
    """Iterate with a progress bar, and check after every image how many were left out."""
    for image in tqdm(
        images, desc="encoding images", unit="image", total=total, file=sys.stderr, disable=total < FEW
    ):
        yield image
        check_skipped(source, share)
