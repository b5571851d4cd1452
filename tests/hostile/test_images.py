"""The one opener of pictures: every kind of file of one picture gives the same pixels."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from afa.images import ImageError, open_image, read_pixels

COLOURS = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
GREY = COLOURS[..., :1]
ALPHA = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None, :, None].repeat(9, 0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(array, kind, **options):
    """A picture file as bytes."""
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.squeeze(array))
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(array, colours, bits=16, size=None):
    """A PNG written by hand, since Pillow writes no colours of 16 bits. colours: its kind, as the format numbers them."""
    height, width = size or array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(array, bits, kind, photometric=1):
    """A grey TIFF written by hand. kind: 1 unsigned, 2 signed, 3 floating point."""
    height, width = array.shape[:2]
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 200)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, array.nbytes), (339, 3, kind)]
    entries = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + array.tobytes()


def wide(array):
    return array.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "data",
    [
        encoded(wide(GREY), "PNG"),
        encoded(wide(GREY), "TIFF"),
        encoded(wide(GREY), "PPM"),
        encoded(wide(GREY).astype(np.int32), "TIFF"),
        encoded(GREY.astype(np.int32), "TIFF"),
        encoded(GREY.astype(np.float32) / 255, "TIFF"),
        encoded(GREY.astype(np.float32), "TIFF"),
        encoded(wide(GREY).astype(np.float32), "TIFF"),
        tiff(wide(GREY), 16, 1),
        tiff(65_535 - wide(GREY), 16, 1, photometric=0),
        tiff(GREY.astype(np.uint32) * 16_843_009, 32, 1),
        png(np.concatenate([wide(GREY), np.full_like(wide(GREY), 65_535)], 2), 4),
        encoded(np.concatenate([GREY, np.full_like(GREY, 255)], 2), "PNG"),
        encoded(GREY, "PNG", icc_profile=SRGB),
    ],
)
def test_grey_of_any_depth_is_the_same_picture_as_in_8_bits(data):
    assert (read_pixels(data) == GREY).all()


@pytest.mark.parametrize(
    "data",
    [
        encoded(COLOURS, "PNG"),
        encoded(COLOURS, "PNG", icc_profile=SRGB),
        encoded(COLOURS, "TIFF"),
        encoded(COLOURS, "BMP"),
        encoded(COLOURS, "WEBP", lossless=True),
        png(wide(COLOURS), 2),
        png(np.concatenate([wide(COLOURS), np.full_like(wide(GREY), 65_535)], 2), 6),
        encoded(np.concatenate([COLOURS, np.full_like(GREY, 255)], 2), "PNG"),
    ],
)
def test_opaque_colours_keep_their_bits(data):
    assert (read_pixels(data) == COLOURS).all()


def test_a_picture_of_8_bits_is_what_pillow_reads():
    for kind in ("JPEG", "WEBP"):
        data = encoded(COLOURS, kind)
        assert (read_pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_hidden_colours_of_transparent_pixels_are_white(kind):
    data = encoded(np.concatenate([COLOURS, ALPHA], 2)[:8], kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert (read_pixels(data) == np.where(ALPHA > 0, COLOURS, 255)[:8]).all()


def test_palettes_grey_and_single_colours_may_be_transparent():
    palette = Image.fromarray(COLOURS).quantize(16)
    clear = np.asarray(palette)[..., None] == 3
    for kind in ("PNG", "GIF"):
        found = read_pixels(encoded(palette, kind, transparency=3))
        assert (found == np.where(clear, 255, np.asarray(palette.convert("RGB")))).all()
    assert (read_pixels(encoded(np.concatenate([GREY, ALPHA], 2), "PNG")) == np.where(ALPHA > 0, GREY, 255)).all()
    for array, level in ((COLOURS, tuple(COLOURS[2, 3].tolist())), (GREY, int(GREY[2, 3, 0]))):
        assert (read_pixels(encoded(array, "PNG", transparency=level))[2, 3] == 255).all()
    half = np.full((2, 2, 4), (200, 0, 0, 128), np.uint8)
    assert abs(read_pixels(encoded(half, "PNG")).astype(int) - (227, 127, 127)).max() <= 1


def test_colours_of_another_profile_become_srgb():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    white = Image.merge("LAB", [Image.new("L", (4, 4), level) for level in (255, 128, 128)])
    assert read_pixels(encoded(white, "TIFF")).min() >= 250  # it has no stored profile; its mode says what it is
    assert (read_pixels(encoded(COLOURS, "PNG", icc_profile=lab)) == COLOURS).all()  # of other channels: not usable
    swapped = SRGB.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")  # red is green
    found = read_pixels(encoded(np.full((4, 4, 3), (255, 0, 0), np.uint8), "PNG", icc_profile=swapped))
    assert found[0, 0].argmax() == 1
    layered = encoded(np.full((4, 4, 4), (255, 0, 0, 255), np.uint8), "PNG", icc_profile=swapped)
    assert (read_pixels(layered) == found).all()


def test_a_profile_that_cannot_be_used_is_told_once(capsys):
    for _ in range(2):
        assert (read_pixels(encoded(COLOURS, "PNG", icc_profile=b"no profile"), "a.png") == COLOURS).all()
    assert capsys.readouterr().err.count("a.png has a colour profile") <= 1


@pytest.mark.parametrize("array", [COLOURS, wide(GREY), np.concatenate([COLOURS, ALPHA], 2)])
def test_pictures_are_turned_upright_whatever_their_depth(array):
    turned = Image.Exif()
    turned[0x112] = 6
    upright = np.rot90(read_pixels(encoded(array, "PNG")), -1)
    for kind in ("PNG", "TIFF"):
        assert (read_pixels(encoded(array, kind, exif=turned)) == upright).all()


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.fromarray(np.full((4, 4, 3), level, np.uint8)) for level in (10, 200)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (read_pixels(data) == 10).all(), kind


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "cannot be read"),
        (b"<html>404 Not Found</html>", "cannot be read"),
        *((encoded(COLOURS, kind)[:-30], "cannot be read") for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")),
        (png(COLOURS, 2, 8, (50_000, 50_000)), "2,500,000,000.*178,956,970"),
        (png(COLOURS, 2, 8, (13_000, 14_000)), "182,000,000|14000 × 13000"),
        (png(COLOURS[:0], 2, 8, (0, 5)), "cannot be read"),
        (encoded(GREY.astype(np.float32) * 3.3, "TIFF"), "floating-point"),
        (encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), "NaN"),
        (encoded(np.full((4, 4), -1.0, np.float32), "TIFF"), "floating-point"),
        (encoded(np.full((4, 4), -3, np.int32), "TIFF"), "negative"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "cannot be read"),  # a program
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(data, named):
    with pytest.raises(ImageError, match=named) as raised:
        open_image(data, "x.png")
    assert str(raised.value).startswith("x.png ") and "\n" not in str(raised.value)


def test_devices_pipes_folders_and_missing_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", tmp_path / "missing.png"):
        with pytest.raises(ImageError, match=str(path)):
            open_image(path)
