"""Models that this package brings along, by a spelling that works wherever it is installed: demo:curves, demo:ensemble …"""

import re
from pathlib import Path

from afa.errors import UserError
from afa.lookup import unknown

ASSETS = Path(__file__).parent / "demo" / "assets"
EMBEDDED = ("curves", "angles", "patterns", "base", "ensemble")
SPELLING = re.compile(r"(?P<name>(?:[A-Za-z0-9][\w.-]*=)?)demo:(?P<model>[\w.-]*)(?P<rest>.*)", re.DOTALL)


def located(text: str) -> str:
    """A place with the folder of an embedded model for its spelling; any other text as it is.

    text: demo:MODEL, also as part of an expert: NAME=demo:MODEL+style.safetensors. What exists under that name goes first.
    Raises UserError for a model that is not embedded.
    """
    found = SPELLING.fullmatch(text)
    if found is None or Path(text).exists():
        return text
    if found["model"] not in EMBEDDED:
        raise UserError(unknown(f"demo:{found['model']}", [f"demo:{name}" for name in EMBEDDED], "embedded model"))
    return f"{found['name']}{ASSETS / found['model']}{found['rest']}"


def as_typed(sentence: str) -> str:
    """A sentence with the spelling of embedded models for their folders: demo:curves/unet is what the user can find in the command."""
    return sentence.replace(f"{ASSETS}/", "demo:")


def spelled(path: Path) -> str | None:
    """The spelling of an embedded model's folder; None for any other."""
    path = path.resolve()
    return f"demo:{path.name}" if path.parent == ASSETS.resolve() and path.name in EMBEDDED else None
