"""From captioned images to probes: read, encoded by the common VAE, an image each."""

import sys
from typing import Any

from tqdm import tqdm

from afa.errors import UserError
from afa.screening.probes import Probes
from afa.seeds import generator
from afa.training.data import encode
from afa.training.noise import Noising
from afa.training.pictures import Crop
from afa.training.sources.base import Columns, Source
from afa.training.sources.table import open_source

FEW = 50  # images, encoded without a bar
AT_ONCE = 8


def find(place: str, images: int, columns: Columns | None = None) -> Source:
    """List the first so many captioned images. Raises UserError if there are fewer than two."""
    source = open_source(place, columns, images)
    if len(source.samples) < 2:
        raise UserError(f"--data {place} holds {len(source.samples)} captioned image; at least 2 are needed for an interval")
    return source


def encoded(place: str | Source, vae: Any, noising: Noising, *, images: int, draws: int, seed: int, resolution: int) -> Probes:
    """The probes of the images that can be read; others are left out and noted in the source. resolution: of the squares, in pixels."""
    source = find(place, images) if isinstance(place, str) else place
    work = [(sample, [Crop(resolution)]) for sample in source.samples]
    vae.to(noising.device)

    def watched(rows: Any) -> Any:
        return tqdm(rows, desc="encoding images", unit="image", total=len(work), file=sys.stderr, disable=len(work) < FEW)

    found = encode(work, vae, AT_ONCE, source.skipped, watched)
    batch = noising.draw(found, list(range(len(found))), generator(seed))
    vae.to("cpu")
    return Probes(batch.latents, found.captions, found.sizes, draws, seed, found.digest)
