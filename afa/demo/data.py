"""The embedded worlds as protocols and sources of training images; and the far world's models."""

import functools
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from afa.data.sources import Sample
from afa.demo.draw import draw
from afa.demo.worlds import FAR, NEAR, World
from afa.errors import UserError
from afa.evaluation.protocols import Protocol, ProtocolOptions, Real
from afa.places import ASSETS

STEPS, GUIDANCE = 20, 3.0
# Seeds; the worlds were built with others.
JUDGED, TRAINING, REAL, TUNING = 500_000, 600_000, 800_000, 810_000
JUDGED_SCENES, REAL_SCENES, TRAINING_SCENES, TUNING_SCENES = 320, 1_000, 512, 64


def protocol(request: ProtocolOptions) -> Protocol:
    """Make the protocol of 320 mixed scenes of the far world: one image each, 20 steps, guidance 3, 64 px.

    The Fréchet distance is to 1,000 other mixed scenes.
    """
    return _protocol("scenes", FAR, ("attributes", "frechet"), request)


def near_protocol(request: ProtocolOptions) -> Protocol:
    """Make the protocol of the near world; else as the far world's.

    Methods are a few thousandths apart there. The probability of the attributes leads, because it tells them
    apart with fewer images than their accuracy does.
    """
    return _protocol("near", NEAR, ("near_probability", "near_attributes", "near_frechet"), request)


def _protocol(name: str, world: World, metrics: tuple[str, ...], request: ProtocolOptions) -> Protocol:
    captions = [scene.caption for scene in world.sample("mixed", request.prompts or JUDGED_SCENES, JUDGED)]
    return Protocol(
        name,
        request.items(captions),
        request.sampling(STEPS, GUIDANCE),
        metrics=metrics,
        scheduler=request.scheduler,
        real=Real(
            json.dumps({"mixed scenes": REAL_SCENES, "seed": REAL}),
            lambda: world.render_all(world.sample("mixed", REAL_SCENES, REAL), REAL),
        ),
        tuning=[scene.caption for scene in world.sample("mixed", TUNING_SCENES, TUNING)],
        training=lambda folder: draw(folder, "mixed", TRAINING_SCENES, TRAINING + request.seed, world),
        reward=name,
    )


def from_scenes(place: str) -> list[Sample]:
    """The samples of "scenes:COUNT" or "near:COUNT": the images of `python -m afa.demo.draw --seed 600000`.

    Raises UserError if COUNT is not a count.
    """
    name, _, count = place.partition(":")
    if not (count.isascii() and count.isdigit() and len(count) <= 6 and int(count) > 0):
        raise UserError(f"--data {place[:80]}: say how many scenes, from 1 to 999999, such as {name}:512")
    world = NEAR if name == "near" else FAR
    return [
        Sample(
            f"scene {index}",
            scene.caption,
            f"{name.rstrip('s')} {TRAINING} {index} {scene.caption}",
            functools.partial(_png, world, scene, index),
        )
        for index, scene in enumerate(world.sample("mixed", int(count), TRAINING))
    ]


def _png(world: World, scene: Any, index: int) -> bytes:
    image, file = world.render(scene, np.random.default_rng((TRAINING, index))), io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


BASE = FAR.folder("base")
EXPERTS = {name: FAR.folder(name) for name in FAR.experts}
ENSEMBLE = FAR.folder("ensemble")  # of the three, as `afa demo` trains it
RECORD = ASSETS / "build.json"  # steps and losses of the far world's parts
