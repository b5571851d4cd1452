"""Images of a comparison, small, inside the page itself."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from afa.evaluation.results import Method
from afa.images import open_image

LARGEST = 224  # pixels of the longer side; images up to twice SHARP_UP_TO are kept as they are
SHARP_UP_TO = 96  # pixels; smaller images are shown with hard edges


class Thumbnails:
    """Reads images of runs below a folder. missing: paths that could not be read; known: how many were."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.missing: list[Path] = []
        self.known: dict[Path, str] = {}

    def available(self, method: Method) -> bool:
        """Whether a method has images of its own at all."""
        return self.folder is not None and bool(method.runs[0].images)

    def html(self, method: Method, index: int, words: str) -> str:
        """The image of one item by a method's first run, or a place holder. words: for those who cannot see it."""
        uri = self._uri(method, index)
        if uri is None:
            return '<span class="no-image">no image</span>'
        return f'<img src="{uri}" alt="{escape(words, quote=True)}" loading="lazy">'

    def _uri(self, method: Method, index: int) -> str | None:
        assert self.folder is not None
        path = self.folder / min(method.runs, key=lambda run: run.seed).images / image_name(index)
        if path not in self.known and path not in self.missing:
            try:
                self.known[path] = data_uri(path)
            except (OSError, ValueError, SyntaxError):  # what Pillow raises for files that are not there, cut short, or no images
                self.missing.append(path)
        return self.known.get(path)


def image_name(index: int) -> str:
    """The file of an item, as afa.evaluation.images writes it."""
    return f"{index:06d}.png"


def data_uri(path: Path) -> str:
    """An image file as a WebP data URI: small ones exactly, large ones reduced."""
    picture = open_image(path)
    small = max(picture.size) <= 2 * SHARP_UP_TO
    if not small:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=small, quality=60 if small else 82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
