"""A studio of the embedded ensemble, and runs in it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from afa.demo.data import ENSEMBLE
from afa.webui.job import Job, Picture
from afa.webui.settings import UiSettings
from afa.webui.studio import Studio

PROMPT = "a red star left of a blue ring on a dotted mint background"
ASKED = {"prompt": PROMPT, "methods": ["afa"], "steps": 2, "guidance": 3}
HARMFUL = "<img src=x onerror=\"document.title='owned'\">"


def open_studio(folder: Path, *sources: str) -> Studio:
    """With its gallery there."""
    return Studio.open(UiSettings(output=str(folder), device="cpu"), list(sources) or [str(ENSEMBLE)])


def run(studio: Studio, **changes: Any) -> Job:
    """Two steps of AFA, or what is asked for instead."""
    job = studio.job(ASKED | changes)
    studio.run(job)
    return job


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(picture.path))
