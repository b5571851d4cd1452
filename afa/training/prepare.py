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

from afa.data.buckets import Buckets, find_buckets, make_sizes
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
    source.tell()
    return source


def resolution_of(settings: LoopSettings, ensemble: Ensemble) -> int:
    """Return the resolution in pixels.

    It is a multiple of the VAE's factor and of a transformer's patches; raises UserError otherwise.
    """
    denoiser, factor = ensemble.denoiser, latents_of(ensemble.frame.vae).factor
    if not settings.resolution and not denoiser.side:
        raise UserError(f"'{denoiser.names[0]}' has no size of its own (sample_size); give --resolution")
    resolution = settings.resolution or denoiser.side * factor
    multiple = multiple_of(ensemble)
    if resolution % multiple:
        what = (
            "the VAE's down-sampling factor"
            if multiple == factor
            else f"{factor} of the VAE times patches of {denoiser.interface.patch}"
        )
        raise UserError(f"--resolution {resolution} is not a multiple of {multiple}, {what}")
    return resolution


def multiple_of(ensemble: Ensemble) -> int:
    """Return the pixels that sides must be a multiple of: the VAE's factor times a transformer's patches."""
    return latents_of(ensemble.frame.vae).factor * ensemble.denoiser.interface.patch


def buckets_of(settings: LoopSettings, ensemble: Ensemble, source: ImageSource) -> Buckets | None:
    """Return the bucket of every image, whose sizes are read; None without --buckets.

    Raises UserError for steps and sides of which no buckets can be made.
    """
    if not settings.buckets:
        return None
    resolution = resolution_of(settings, ensemble)
    step, sides = settings.bucket_step, settings.bucket_sides
    sizes = make_sizes(resolution, multiple_of(ensemble), step, sides)
    return find_buckets(source.samples, resolution, sizes)


def training_images(source: ImageSource, settings: LoopSettings) -> int:
    """Return how many images a pass over the training images takes, each as often as it counts."""
    return sum(sample.repeats for sample in split(source.samples, settings.held_out, settings.seed)[0])


def check_objective(
    settings: LoopSettings, ensemble: Ensemble, source: ImageSource, buckets: Buckets | None = None
) -> None:
    """Raise UserError for what would fail after the data are encoded: schedule, weighting, reward models.

    buckets: of the images, each of which the reward must be able to judge; None: squares
    """
    cpu = torch.device("cpu")
    context = make_context(settings, ensemble, cpu)
    make_objectives(context, [])
    make_watch(settings, cpu)
    if context.reward is not None and is_small(settings.reward):
        side = resolution_of(settings, ensemble)
        captions = [source.samples[0].caption]
        for height, width in sorted(set(buckets.chosen)) if buckets is not None else [(side, side)]:
            image = torch.zeros(1, 3, height, width, requires_grad=True)
            try:
                context.reward(image, captions)
            except (RuntimeError, ValueError) as error:
                if buckets is None:
                    raise
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"--reward {settings.reward} cannot judge images of {width} × {height} pixels, a bucket "
                    f"of --buckets ({why[:120]}); leave out --buckets, or choose another reward"
                ) from None


def encode_data(
    settings: LoopSettings,
    source: ImageSource,
    resolution: int,
    vae: Any,
    held_out_too: bool = True,
    buckets: Buckets | None = None,
) -> list[Encoded]:
    """Return the encoded training set and, unless it is left out, the held-out set.

    buckets: of all images of the source; None: all are cut to squares
    Unreadable images are left out and reported. Raises UserError if there are too many.
    """
    training, held_out = split(list(enumerate(source.samples)), settings.held_out, settings.seed)
    augmented, plain = Augmentation(settings.crops, settings.flip), Augmentation()
    groups = [(training, augmented), *([(held_out, plain)] if held_out_too else [])]
    chosen = [None] * len(source.samples) if buckets is None else buckets.chosen
    parts: list[list[Work]] = [
        [
            (sample, augmentation.of(resolution, settings.seed, index, chosen[index]))
            for index, sample in images
        ]
        for images, augmentation in groups
    ]
    encoder: Callable[..., Encoded] = (
        encode if settings.cache is None else _caching(Path(settings.cache), parts, vae)
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
    images, others = split(source.samples, settings.held_out, settings.seed)
    training = [sample.caption for sample in images for _ in range(sample.repeats)]
    held_out = [sample.caption for sample in others]
    training += recombined(training, least - len(training), held_out, settings.seed)
    found = []
    for part in (training, held_out):
        digest = hashlib.sha256("\0".join(part).encode()).hexdigest()
        found.append(Encoded(torch.empty(len(part), 0), part, sizes.repeat(len(part), 1), digest))
    return found[0], found[1]


def _caching(folder: Path, parts: list[list[Work]], vae: Any) -> Callable[..., Encoded]:
    """Return an encoder that stores its results in a folder. It announces what will be written."""
    cache = LatentCache(folder, vae)
    missing = [stores for part in parts for stores in missing_rows(part, cache)]
    announce(folder, "images", [stores.moments.row_bytes + stores.sizes.row_bytes for stores in missing])
    return functools.partial(encode_cached, cache=cache)


def _watched(source: ImageSource, share: float, total: int, images: Iterable[Any]) -> Iterator[Any]:
    """Iterate with a progress bar, and check after every image how many were left out."""
    for image in tqdm(
        images, desc="encoding images", unit="image", total=total, file=sys.stderr, disable=total < FEW
    ):
        yield image
        check_skipped(source, share)
