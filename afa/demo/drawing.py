"""How scenes of the embedded worlds are drawn: shapes, colours, textures; 64×64 pixels."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SIZE = 64  # pixels
SUPERSAMPLING = 3  # subpixels per side when an outline is drawn


def _star(x: Array, y: Array) -> NDArray[np.bool_]:
    """Return a five-pointed star: fold the plane into one of ten wedges, then test one straight edge."""
    angle = np.abs(np.mod(np.arctan2(x, -y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    u, v = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    inner_u, inner_v = 0.44 * np.cos(np.pi / 5), 0.44 * np.sin(np.pi / 5)
    return (u - 1.05) * inner_v - v * (inner_u - 1.05) < 0


# Inside test in the shape's own frame: x right, y down, the shape within the unit circle.
OUTLINES: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "circle": lambda x, y: np.hypot(x, y) < 0.88,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) < 0.27,
    "moon": lambda x, y: (np.hypot(x, y) < 0.95) & (np.hypot(x - 0.5, y + 0.15) > 0.72),
    "heart": lambda x, y: (
        (1.2 * x**2 + (0.1 - 1.15 * y) ** 2 - 0.8) ** 3 < 1.2 * x**2 * (0.1 - 1.15 * y) ** 3
    ),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.75,
    "triangle": lambda x, y: (y < 0.7) & (np.abs(x) * 1.7 - y < 0.95),
    "star": _star,
    "cross": lambda x, y: (
        (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.92)
    ),
    "diamond": lambda x, y: np.abs(x) * 1.45 + np.abs(y) < 1.02,
    "arrow": lambda x, y: (
        ((y > -0.95) & (np.abs(x) < (y + 0.95) * 0.85) & (y < 0.0))
        | ((np.abs(x) < 0.3) & (y >= 0.0) & (y < 0.95))
    ),
    "house": lambda x, y: (
        ((y > -0.95) & (np.abs(x) < (y + 0.95) * 1.25) & (y < -0.2))
        | ((np.abs(x) < 0.68) & (y >= -0.2) & (y < 0.8) & ~((np.abs(x) < 0.22) & (y > 0.1)))
    ),
    "bolt": lambda x, y: (
        ((np.abs(x - 0.28 + 0.55 * (y + 0.95)) < 0.4) & (y > -0.95) & (y < 0.12))
        | ((np.abs(x + 0.28 - 0.55 * (0.95 - y)) < 0.4) & (y < 0.95) & (y > -0.12))
    ),
    "hourglass": lambda x, y: (np.abs(x) < 0.12 + 0.72 * np.abs(y)) & (np.abs(y) < 0.88),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "orange": (245, 140, 20),
    "yellow": (250, 222, 40),
    "green": (36, 150, 60),
    "blue": (35, 80, 210),
    "purple": (125, 45, 165),
    "pink": (250, 130, 190),
    "black": (25, 25, 30),
}

GROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (176, 178, 182),
    "tan": (206, 180, 140),
    "mint": (160, 214, 184),
    "lavender": (190, 176, 226),
}

# Where the darker part of a texture lies: position in pixels, a random phase for each axis -> a mask in [0,
# 1].
TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "plain": lambda x, y: np.zeros_like(x),
    "striped": lambda x, y: _soft(np.sin(2 * np.pi * (x + y) / 15)),
    "checked": lambda x, y: _soft(2 * np.sin(2 * np.pi * x / 21) * np.sin(2 * np.pi * y / 21)),
    "dotted": lambda x, y: _soft(np.cos(2 * np.pi * x / 11) + np.cos(2 * np.pi * y / 11) - 0.9),
    "wavy": lambda x, y: _soft(np.sin(2 * np.pi * (y + 3.2 * np.sin(2 * np.pi * x / 22)) / 12)),
}


def _soft(wave: Array) -> Array:
    """Return a wave whose edges are about a pixel wide."""
    return np.clip(wave * 2.5 + 0.5, 0, 1)


def background(texture: str, ground: str, rng: np.random.Generator) -> Array:
    """Draw a textured background: (64, 64, 3) float32 in 0 … 255; its phase and shade vary."""
    axis = np.arange(SIZE, dtype=np.float32)
    x, y = np.meshgrid(axis + rng.uniform(0, 64), axis + rng.uniform(0, 64))
    dark = TEXTURES[texture](x, y)[..., None]
    base = np.asarray(GROUNDS[ground], np.float32) * rng.uniform(0.95, 1.05)
    return (base * (1 - 0.3 * dark)).astype(np.float32)


def draw_shape(
    image: Array,
    shape: str,
    colour: str,
    centre: NDArray[np.float64],
    radii: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Blend one shape into an image in place; supersampling anti-aliases its edge.

    image:  (64, 64, 3)
    centre: x, y in pixels
    radii:  the smallest and largest radius in pixels; radius, angle and shade vary
    """
    radius, angle = rng.uniform(*radii), np.deg2rad(rng.uniform(-10, 10))
    left, top = (max(int(edge - radius) - 1, 0) for edge in centre)
    right, bottom = (min(int(edge + radius) + 3, SIZE) for edge in centre)
    u = (_subpixels(left, right) - centre[0]) / radius
    v = (_subpixels(top, bottom) - centre[1]) / radius
    x, y = np.meshgrid(u * np.cos(angle), v * np.cos(angle))
    x, y = x + v[:, None] * np.sin(angle), y - u * np.sin(angle)
    inside = OUTLINES[shape](x, y)
    cover = inside.reshape(bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING).mean(
        (1, 3), dtype=np.float32
    )
    tint = np.asarray(COLOURS[colour], np.float32) + rng.uniform(-10, 10, 3)
    patch = image[top:bottom, left:right]
    patch += cover[..., None] * (tint - patch)


def as_pixels(image: Array) -> NDArray[np.uint8]:
    """Round an image in 0 … 255 to uint8."""
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _subpixels(start: int, stop: int) -> Array:
    """Return the centres of the subpixels of pixels start … stop-1."""
    return (np.arange(start * SUPERSAMPLING, stop * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
