"""The embedded world as a protocol, a source of training images, and its experts."""

import functools
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from afa.data.sources import Sample
from afa.demo.scenes import Scene, draw, render, render_all, sample_scenes
from afa.errors import UserError
from afa.evaluation.protocols import Protocol, ProtocolOptions, Real

SCENES, STEPS, GUIDANCE = 160, 20, 3.0
JUDGED, TRAINING, REAL, TUNING = 500_000, 600_000, 800_000, 810_000  # seeds; the world was built with others
REAL_SCENES, TRAINING_SCENES, TUNING_SCENES = 1_000, 512, 64


def protocol(request: ProtocolOptions) -> Protocol:
    """Make the protocol of 160 mixed scenes: one image each, 20 steps, guidance 3, 64 px.

    The Fréchet distance is to 1,000 other mixed scenes.
    """
    captions = [scene.caption for scene in sample_scenes("mixed", request.prompts or SCENES, JUDGED)]
    return Protocol(
        "scenes",
        request.items(captions),
        request.sampling(STEPS, GUIDANCE),
        metrics=("attributes", "frechet"),
        scheduler=request.scheduler,
        real=Real(
            json.dumps({"mixed scenes": REAL_SCENES, "seed": REAL}),
            lambda: render_all(sample_scenes("mixed", REAL_SCENES, REAL), REAL),
        ),
        tuning=[scene.caption for scene in sample_scenes("mixed", TUNING_SCENES, TUNING)],
        training=lambda folder: draw(folder, "mixed", TRAINING_SCENES, TRAINING + request.seed),
        reward="scenes",
    )


def from_scenes(place: str) -> list[Sample]:
    """The samples of "scenes:COUNT": the images of `python -m afa.demo.scenes --seed 600000`.

    Raises UserError if COUNT is not a count.
    """
    count = place.partition(":")[2]
    if not (count.isascii() and count.isdigit() and len(count) <= 6 and int(count) > 0):
        raise UserError(f"--data {place[:80]}: say how many scenes, from 1 to 999999, such as scenes:512")
    scenes = sample_scenes("mixed", int(count), TRAINING)
    return [_sample(scene, index) for index, scene in enumerate(scenes)]


def _sample(scene: Scene, index: int) -> Sample:
    return Sample(
        f"scene {index}",
        scene.caption,
        f"scene {TRAINING} {index} {scene.caption}",
        functools.partial(_png, scene, index),
    )


def _png(scene: Scene, index: int) -> bytes:
    image, file = render(scene, np.random.default_rng((TRAINING, index))), io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
EXPERTS = {name: ASSETS / name for name in ("curves", "angles", "patterns")}
ENSEMBLE = ASSETS / "ensemble"  # of the three, as `afa demo` trains it
SCORER = ASSETS / "scorer.safetensors"
REWARD = ASSETS / "reward.safetensors"
RECORD = ASSETS / "build.json"  # steps and losses of everything above
