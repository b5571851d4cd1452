"""Mixed scenes of the embedded world as training data: `--data scenes:512`, drawn when they are read."""

import functools
import io

import numpy as np
from PIL import Image

from afa.demo.scenes import Scene, render, sample_scenes
from afa.errors import UserError
from afa.training.sources.base import Sample, Source

SEED = 600_000  # of the demonstration's training scenes too; nothing that is judged comes from it


def from_scenes(place: str) -> Source:
    """scenes:COUNT. The images of `python -m afa.demo.draw --seed 600000`. Raises UserError for a count that is none."""
    count = place.partition(":")[2]
    if not (count.isascii() and count.isdigit() and len(count) <= 6 and int(count) > 0):
        raise UserError(f"--data {place[:80]}: say how many scenes, from 1 to 999999, such as scenes:512")
    scenes = sample_scenes("mixed", int(count), SEED)
    return Source(place, [_sample(scene, index) for index, scene in enumerate(scenes)])


def _sample(scene: Scene, index: int) -> Sample:
    return Sample(f"scene {index}", scene.caption, f"scene {SEED} {index} {scene.caption}", functools.partial(_png, scene, index))


def _png(scene: Scene, index: int) -> bytes:
    image, file = render(scene, np.random.default_rng((SEED, index))), io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()
