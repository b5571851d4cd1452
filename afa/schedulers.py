"""Schedulers by the names people use, and from a folder."""

import json
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.lookup import look_up

# name on the command line -> diffusers class and what is set besides the experts' own noise schedule
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def make_scheduler(name: str, like: Any) -> Any:
    """The scheduler of that name with the noise schedule and prediction type of another. Raises UserError for an unknown name."""
    import diffusers

    try:
        kind, options = look_up(name, SCHEDULERS, "scheduler")
    except ValueError as error:
        raise UserError(str(error)) from None
    return getattr(diffusers, kind).from_config(like.config, **options)


def read_scheduler(folder: Path) -> Any:
    """The scheduler of a diffusers folder, or of its sub-folder `scheduler`."""
    import diffusers

    if (folder / "scheduler").is_dir():
        folder = folder / "scheduler"
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no scheduler_config.json")
    return getattr(diffusers, json.loads(file.read_text())["_class_name"]).from_pretrained(folder, local_files_only=True)
