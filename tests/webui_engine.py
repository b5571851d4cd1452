"""A engine of the embedded ensemble, and runs in it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from afa.demo.data import ENSEMBLE
from afa.webui.engine import Engine
from afa.webui.queue import DrawingJob, GalleryPicture
from afa.webui.settings import UiSettings

PROMPT = "a red star left of a blue ring on a dotted mint background"
ASKED = {"prompt": PROMPT, "methods": ["afa"], "steps": 2, "guidance": 3}
HARMFUL = "<img src=x onerror=\"document.title='owned'\">"


def open_engine(folder: Path, *sources: str) -> Engine:
    """With its gallery there."""
    return Engine.open(UiSettings(output=str(folder), device="cpu"), list(sources) or [str(ENSEMBLE)])


def run(engine: Engine, **changes: Any) -> DrawingJob:
    """Two steps of AFA, or what is asked for instead."""
    job = engine.job(ASKED | changes)
    engine.run(job)
    return job


def pixels(picture: GalleryPicture) -> np.ndarray:
    return np.asarray(Image.open(picture.path))
