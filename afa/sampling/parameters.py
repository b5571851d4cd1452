"""How an image was made, as AUTOMATIC1111's web UI writes it into PNGs (text chunk `parameters`).

Galleries and the web UIs read this form; afa itself reads its own chunk, which holds everything.
Source: AUTOMATIC1111/stable-diffusion-webui 1.10, modules/processing.py, create_infotext, and
modules/infotext_utils.py, parse_generation_parameters.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from afa.fingerprint import digest
from afa.version import __version__

BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # line breaks and control characters
NEGATIVE = "Negative prompt:"
# scheduler, as images record it -> A1111's sampler and schedule
SAMPLERS = {
    "ddim": ("DDIM", None),
    "DDIMScheduler": ("DDIM", None),
    "pndm": ("PLMS", None),
    "PNDMScheduler": ("PLMS", None),
    "euler": ("Euler", None),
    "EulerDiscreteScheduler": ("Euler", None),
    "FlowMatchEulerDiscreteScheduler": ("Euler", None),
    "euler_a": ("Euler a", None),
    "EulerAncestralDiscreteScheduler": ("Euler a", None),
    "heun": ("Heun", None),
    "HeunDiscreteScheduler": ("Heun", None),
    "lms": ("LMS", None),
    "LMSDiscreteScheduler": ("LMS", None),
    "dpm++": ("DPM++ 2M", None),
    "DPMSolverMultistepScheduler": ("DPM++ 2M", None),
    "dpm++_karras": ("DPM++ 2M", "Karras"),
    "dpm++_sde": ("DPM++ 2M SDE", None),
    "unipc": ("UniPC", None),
    "UniPCMultistepScheduler": ("UniPC", None),
    "lcm": ("LCM", None),
    "LCMScheduler": ("LCM", None),
}


def parameters(facts: Mapping[str, Any], width: int, height: int) -> str | None:
    """Write the settings of an image as A1111 does.

    facts:         what the image records, see afa.sampling.image_files
    width, height: of the image in pixels
    Prompts are put on one line each, so that no prompt can end its part; the rest are values that are quoted
    where they hold a comma, a colon or a line break. Returns None for an image without prompt and seed.
    """
    if not {"prompt", "seed", "steps"} <= facts.keys():
        return None
    sampler, schedule = SAMPLERS.get(str(facts.get("scheduler")), (facts.get("scheduler"), None))
    values = {
        "Steps": facts["steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _short(facts.get("guidance")),
        "Seed": facts["seed"],
        "Size": f"{width}x{height}",
        "Model hash": _model_hash(facts),
        "Model": _model(facts),
        "Version": f"afa {__version__}",
    }
    listed = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
    negative = facts.get("negative_prompt")
    lines = [_one_line(facts["prompt"]), *([f"{NEGATIVE} {_one_line(negative)}"] if negative else []), listed]
    return "\n".join(lines)


def _one_line(prompt: Any) -> str:
    """A prompt without line breaks; at its beginning, the words that begin another part are set apart."""
    text = BREAKS.sub(" ", str(prompt)).strip()
    return text.replace(":", " :", 1) if text.startswith(NEGATIVE) else text


def _quoted(value: Any) -> str:
    text = BREAKS.sub(" ", str(value))
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"]', text) else text


def _short(number: Any) -> Any:
    return f"{number:g}" if isinstance(number, float) else number


def _model(facts: Mapping[str, Any]) -> str | None:
    """The experts, and how they are combined; None if the image does not say."""
    how = facts.get("method") or (None if facts.get("expert") else "afa")
    names = [facts["expert"]] if facts.get("expert") else list(facts.get("experts") or [])
    joined = " + ".join(map(str, names))
    return f"{joined} ({how})" if how and len(names) > 1 else joined or None


def _model_hash(facts: Mapping[str, Any]) -> str | None:
    """The first ten digits of the aggregators' sha256; without aggregators, of one hash over all files."""
    files = facts.get("files")
    found = facts.get("aggregators") or (digest(files) if files else None)
    return None if found is None else str(found)[:10]
