"""Pictures that say how they were made: PNGs with a text chunk of their settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from afa import __version__
from afa.errors import UserError
from afa.files import replacing
from afa.images import PILLOW_ERRORS
from afa.text_files import TextError, parse_json

CHUNK = "afa"  # the PNG text chunk that holds the settings


def save_picture(path: Path, image: NDArray[np.uint8], metadata: dict[str, Any]) -> None:
    """One image (H, W, 3) as a PNG, whole or not at all."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(CHUNK, json.dumps({**metadata, "afa": __version__}, ensure_ascii=False))
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=chunk)


def read_made(path: Path, *, whole: bool = True) -> dict[str, Any] | None:
    """What a picture that is to be kept says of itself, {} if nothing; None if it is not there, broken or cut off.

    whole: decode it to the end, since a picture that a crash cut off begins like a whole one.
    """
    try:
        return _settings(path, whole)
    except PILLOW_ERRORS:
        return None


def read_metadata(path: Path, name: str | None = None) -> dict[str, Any]:
    """What a picture says of itself. name: what to call it in an error. Raises UserError if it says nothing, or is none."""
    name = name or path.name
    made_here = "give one that was made here or by afa generate"
    try:
        found = _settings(path, whole=False)
    except PILLOW_ERRORS as error:
        why = "it claims to be too large" if isinstance(error, Image.DecompressionBombError) else type(error).__name__
        raise UserError(f"{name} cannot be read as a PNG picture ({why}); {made_here}") from None
    if not found:
        raise UserError(f"{name} does not say how it was made (it has no text chunk '{CHUNK}'); {made_here}")
    return found


def _settings(path: Path, whole: bool) -> dict[str, Any]:
    """The settings in a PNG, {} if there are none. Raises one of PILLOW_ERRORS for what is no PNG."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no plain file")
    with Image.open(path, formats=["PNG"]) as image:
        text = image.info.get(CHUNK, "{}")
        if whole:
            image.load()
    try:
        found = parse_json(str(text), path.name)
    except TextError:
        return {}
    return found if isinstance(found, dict) else {}
