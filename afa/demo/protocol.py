"""The protocol `scenes`: mixed scenes of the embedded world, judged by its exact scorer."""

import json

from afa.demo.draw import draw
from afa.demo.scenes import render_all, sample_scenes
from afa.evaluation.protocols.base import Protocol, Real, Request

SCENES, STEPS, GUIDANCE = 160, 20, 3.0
JUDGED, TRAINING, REAL, TUNING = 500_000, 600_000, 800_000, 810_000  # seeds; none occurs in the building of the world
REAL_SCENES, TRAINING_SCENES, TUNING_SCENES = 1_000, 512, 64


def protocol(request: Request) -> Protocol:
    """160 mixed scenes, one image each, 20 steps, guidance 3, 64 px; Fréchet distance to 1,000 other mixed scenes."""
    captions = [scene.caption for scene in sample_scenes("mixed", request.prompts or SCENES, JUDGED)]
    return Protocol(
        "scenes",
        request.items(captions),
        request.sampling(STEPS, GUIDANCE),
        metrics=("attributes", "frechet"),
        scheduler=request.scheduler,
        real=Real(json.dumps({"mixed scenes": REAL_SCENES, "seed": REAL}), lambda: render_all(sample_scenes("mixed", REAL_SCENES, REAL), REAL)),
        tuning=[scene.caption for scene in sample_scenes("mixed", TUNING_SCENES, TUNING)],
        training=lambda folder: draw(folder, "mixed", TRAINING_SCENES, TRAINING + request.seed),
        reward="scenes",
    )
