"""Pictures: the one opener of image files for all commands, and PNG files that record how they were made.

Every picture is opened as 8-bit RGB in sRGB, upright, on white. A picture that is so already keeps its bits.
"""

import functools
import io
import json
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from afa.errors import UserError
from afa.files import replacing
from afa.text_files import TextError, parse_json
from afa.version import __version__

OPENER = 2  # part of what caches are kept by: it changes when a kind of picture comes out differently
MOST_PIXELS = 178_956_970  # of one picture; what Pillow calls a decompression bomb
# Kinds that Pillow decodes itself. For EPS it would start Ghostscript, which runs the file as a program.
FORMATS = "PNG JPEG MPO WEBP GIF BMP DIB TIFF PPM AVIF JPEG2000 TGA QOI ICO".split()
# What Pillow raises for data that are no whole picture is one of these.
PILLOW_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError),
    *(MemoryError, struct.error, ImageCms.PyCMSError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
LEVELS = (255, 65_535, 2**31 - 1, 2**32 - 1)  # the largest values that integers of a picture are written for
PROFILE_TOLERANCE = 2  # levels of 255; a profile that moves colours by less is sRGB's, rounded
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag; its values for pictures that lie on their side
BITS, PHOTOMETRIC, SAMPLE_FORMAT, WHITE_IS_ZERO, SIGNED = 258, 262, 339, 0, 2  # of TIFF

_warned: set[str] = set()  # reasons

# Pillow warns from half of MOST_PIXELS on, in words for its own callers.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(UserError):
    """A picture that cannot be used: which, and why, in one sentence."""


def over_white(images: NDArray[Any]) -> NDArray[Any]:
    """Lay drawn pictures with transparency on white: (n, H, W, 4) from 0 to 1 -> (n, H, W, 3).

    Pictures without transparency, (n, H, W, 3), stay as they are.
    """
    if images.shape[-1] != 4:
        return images
    opacity = images[..., 3:]
    laid: NDArray[Any] = images[..., :3] * opacity + (1 - opacity)
    return laid


def open_image(source: Path | str | bytes, name: str | None = None) -> Image.Image:
    """Open a picture as 8-bit RGB.

    source: a file, or the encoded picture
    name:   what to call it in an error; the file's path by default
    Grey and colours of more than 8 bits are scaled by their range. Transparency is laid on white. Colours are
    converted to sRGB. EXIF orientation is applied. Of an animation the first frame is taken.
    Raises ImageError for what is no picture, is cut off, or is too large.
    """
    name = _named(source, name)
    with _opened(source, name) as opened:
        opened.load()
        return _on_white(ImageOps.exif_transpose(_eight_bits(opened)), name)


def picture_size(source: Path | str | bytes, name: str | None = None) -> tuple[int, int]:
    """Return height and width that open_image would give, from a picture's header where that is possible.

    Arguments as of open_image. Raises ImageError for what is no picture, or is too large.
    """
    with _opened(source, _named(source, name)) as opened:
        # Pillow gives the size of a TIFF as it is when it is upright.
        turned = opened.format != "TIFF" and opened.getexif().get(ORIENTATION, 1) in SIDEWAYS
        return (opened.width, opened.height) if turned else (opened.height, opened.width)


def _named(source: Path | str | bytes, name: str | None) -> str:
    return name or ("the picture" if isinstance(source, bytes) else str(source))


@contextmanager
def _opened(source: Path | str | bytes, name: str) -> Iterator[Image.Image]:
    """Open a picture of at most MOST_PIXELS; whatever Pillow raises inside becomes an ImageError."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else _plain(source)
        with Image.open(file, formats=_formats()) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise Image.DecompressionBombError(opened.size)
            yield opened
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels ({_counted(error)}; at most {MOST_PIXELS:,})") from None
    except FileNotFoundError:
        raise ImageError(f"{name} is not there") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} cannot be read as a picture (not {', '.join(FORMATS[:5])}, …)") from None
    except PILLOW_ERRORS as error:
        why = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ImageError(f"{name} cannot be read as a picture ({why[0][:120]})") from None


def read_pixels(source: Path | str | bytes, name: str | None = None) -> NDArray[np.uint8]:
    """Open a picture as in open_image: -> (H, W, 3) uint8."""
    return np.asarray(open_image(source, name))


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # what this Pillow was built with


def _plain(source: Path | str) -> Path:
    """The path of a file. Raises OSError for a device, a pipe or a folder; these are never opened."""
    path = Path(source)
    if path.exists() and not path.is_file():
        raise OSError("it is no plain file")
    return path


def _counted(error: Exception) -> str:
    """The number of pixels in words, from our own size or from Pillow's message."""
    size = error.args[0] if error.args else ""
    if isinstance(size, tuple):
        return f"{size[0]} × {size[1]}"
    numbers = [word for word in str(size).replace("(", " ").split() if word.isdigit()]
    return f"{int(numbers[0]):,}" if numbers else "a decompression bomb"


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as L, or LA if one of its levels is transparent; other pictures unchanged.

    Colours of 16 bits come from Pillow's decoders as 8 bits already.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    values = np.asarray(image)
    bits = (tags.get(BITS) or (16,))[0]
    if image.mode == "F":
        shares = _float_shares(values.astype(np.float64))
    elif image.mode.startswith("I;16"):
        shares = values / float(2**bits - 1 if bits in (10, 12, 14) else 65_535)
    else:
        if bits == 32 and (tags.get(SAMPLE_FORMAT) or (1,))[0] != SIGNED:
            values = values.view(np.uint32)
        if values.min() < 0:
            raise ValueError(f"negative values, {values.min()}; convert it to 8 or 16 bits without sign")
        # 32 bits are mostly a container for 8 or 16; a picture of all 32 that stayed below would be black.
        top = 65_535 if image.format == "PPM" else next(level for level in LEVELS if values.max() <= level)
        shares = values / float(top)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        shares = 1 - shares
    grey = Image.fromarray(np.rint(shares.clip(0, 1) * 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    grey.getexif().update(image.getexif())
    return grey


def _float_shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Floating-point grey as shares of white. Raises ValueError if its range is unclear."""
    if not np.isfinite(values).all():
        raise ValueError("values that are no numbers: NaN or infinite")
    low, high = values.min(), values.max()
    if low < 0 or (high > 1 and (high > 65_535 or (values != np.rint(values)).any())):
        raise ValueError(f"floating-point values {low:.4g} to {high:.4g}; expected 0 to 1, or whole levels")
    return values / (1 if high <= 1 else next(level for level in LEVELS if high <= level))


def _on_white(image: Image.Image, name: str) -> Image.Image:
    """The picture in sRGB, without transparency."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        alpha, image = layered.getchannel("A"), layered.convert("L" if image.mode in ("LA", "La") else "RGB")
    colours = _srgb(image, profile, name)
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """The picture in RGB, converted by its colour profile if it has one that is not sRGB."""
    if image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image.convert("RGB")
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
        if space == "RGB" and image.mode == "L":  # grey pixels among colours
            image = image.convert("RGB")
        transform = _transform(profile, image.mode)
    except (*PILLOW_ERRORS, AttributeError) as error:
        _warn_of_profile(str(error).strip().splitlines()[0][:80], name)
        return image.convert("RGB")
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """The transform from a profile to sRGB; None if it changes nothing beyond rounding."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode not in ("L", "RGB"):
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = Image.fromarray(cube if mode == "RGB" else levels[None])
    moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return transform if np.abs(moved - np.asarray(probe.convert("RGB"))).max() > PROFILE_TOLERANCE else None


def _warn_of_profile(reason: str, name: str) -> None:
    """Warn once for each reason. As in browsers, the picture is then read as sRGB."""
    if reason not in _warned:
        _warned.add(reason)
        sentence = f"{name} has a colour profile that cannot be used ({reason}); it is read as sRGB"
        print(f"afa: {sentence}", file=sys.stderr)


CHUNK = "afa"  # the PNG text chunk that holds the settings


def save_picture(
    path: Path, image: NDArray[np.uint8], metadata: dict[str, Any], parameters: str | None = None
) -> None:
    """Save one image as a PNG, whole or not at all.

    image:      (H, W, 3)
    metadata:   how it was made; stored in the PNG's text chunk, with the version of afa
    parameters: the same as A1111 writes it; stored in a chunk of its own, see afa.sampling.parameters
    """
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(CHUNK, json.dumps({**metadata, "afa": __version__}, ensure_ascii=False))
    if parameters is not None:
        chunk.add_text("parameters", parameters)  # as A1111: iTXt where Latin-1 does not hold it
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=chunk)


def read_made(source: Path | bytes, *, whole: bool = True) -> dict[str, Any] | None:
    """The metadata of a picture: {} if it has none; None if it is missing, broken or cut off.

    source: its file, or the encoded picture
    whole:  decode it to the end, since a picture that a crash cut off begins like a whole one
    """
    try:
        return _settings(source, whole)
    except PILLOW_ERRORS:
        return None


def read_metadata(path: Path, name: str | None = None) -> dict[str, Any]:
    """How a picture was made, as it records it.

    path: of a PNG
    name: what to call it in an error; the file's name by default
    Raises UserError if it records nothing, or is no PNG.
    """
    name = name or path.name
    made_here = "give one that was made here or by afa generate"
    try:
        found = _settings(path, whole=False)
    except PILLOW_ERRORS as error:
        why = (
            "it claims to be too large"
            if isinstance(error, Image.DecompressionBombError)
            else type(error).__name__
        )
        raise UserError(f"{name} cannot be read as a PNG picture ({why}); {made_here}") from None
    if not found:
        raise UserError(f"{name} does not say how it was made (it has no text chunk '{CHUNK}'); {made_here}")
    return found


def _settings(source: Path | bytes, whole: bool) -> dict[str, Any]:
    """The settings in a PNG, {} if there are none. Raises one of PILLOW_ERRORS for what is no PNG."""
    file = io.BytesIO(source) if isinstance(source, bytes) else _plain(source)
    with Image.open(file, formats=["PNG"]) as image:
        text = image.info.get(CHUNK, "{}")
        if whole:
            image.load()
    try:
        found = parse_json(str(text), _named(source, None))
    except TextError:
        return {}
    return found if isinstance(found, dict) else {}
