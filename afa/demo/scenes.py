"""The embedded world: exactly drawn, captioned scenes of two coloured shapes on a textured background.

A scene is a set of attributes. Its caption and its image (64×64 pixels) follow from them, so an image can be
judged attribute by attribute (see scorer.py).
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.files import staged

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
SHAPES: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
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

RELATIONS: dict[
    str, tuple[str, str]
] = {  # words of the caption -> place of the first and of the second object
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
CENTRES: dict[str, tuple[float, float]] = {  # place -> centre in pixels, x then y
    "left": (17, 32),
    "right": (47, 32),
    "top": (32, 17),
    "bottom": (32, 47),
}


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its shape and its colour."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """All that a caption says: two things, how the first lies to the second, and the background."""

    first: Thing
    second: Thing
    relation: str
    texture: str
    ground: str

    @property
    def caption(self) -> str:
        first, second = (
            f"{_article(thing.colour)} {thing.colour} {thing.shape}" for thing in (self.first, self.second)
        )
        return f"{first} {self.relation} {second} on a {self.texture} {self.ground} background"

    @property
    def places(self) -> dict[str, Thing]:
        """Return the things by their place."""
        return dict(zip(RELATIONS[self.relation], (self.first, self.second), strict=True))


@dataclass(frozen=True)
class Domain:
    """A part of the world: the possible shapes of the two objects, and the possible textures."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    textures: tuple[str, ...]

    def sample(self, rng: np.random.Generator) -> Scene:
        """Draw a scene of this domain at random; its two objects have different colours."""
        shapes = [str(rng.choice(self.first)), str(rng.choice(self.second))]
        colours = [str(colour) for colour in rng.choice(list(COLOURS), 2, replace=False)]
        things = [Thing(shape, colour) for shape, colour in zip(shapes, colours, strict=True)]
        if rng.random() < 0.5:
            things.reverse()
        return Scene(
            *things,
            relation=str(rng.choice(list(RELATIONS))),
            texture=str(rng.choice(self.textures)),
            ground=str(rng.choice(list(GROUNDS))),
        )


CURVES = ("circle", "ring", "moon", "heart")
ANGLES = ("triangle", "star", "cross", "diamond")
DOMAINS: dict[str, Domain] = {
    "curves": Domain((*CURVES, "square"), (*CURVES, "square"), ("plain", "striped")),
    "angles": Domain((*ANGLES, "square"), (*ANGLES, "square"), ("plain", "striped")),
    "patterns": Domain(
        ("circle", "square", "triangle"), ("circle", "square", "triangle"), ("checked", "dotted", "wavy")
    ),
}
# A curve and an angle on a pattern: only circle with triangle, one scene in sixteen, lies in a single domain
# (patterns).
MIXED = Domain(CURVES, ANGLES, ("checked", "dotted", "wavy"))


def parse(caption: str) -> Scene:
    """Return the scene that a caption describes. Raises ValueError for other words."""
    words = re.fullmatch(
        r"an? (\w+) (\w+) (\w+(?: of)?) an? (\w+) (\w+) on a (\w+) (\w+) background", caption.strip()
    )
    if words:
        colour, shape, relation, other_colour, other_shape, texture, ground = words.groups()
        known = {colour, other_colour} <= COLOURS.keys() and {shape, other_shape} <= SHAPES.keys()
        if known and relation in RELATIONS and texture in TEXTURES and ground in GROUNDS:
            return Scene(Thing(shape, colour), Thing(other_shape, other_colour), relation, texture, ground)
    raise ValueError(
        f"'{caption}' is not a caption of the demo world, such as '{sample_scenes('mixed', 1, 0)[0].caption}'"
    )


def sample_scenes(domain: str, count: int, seed: int) -> list[Scene]:
    """Return `count` random scenes of one domain, of "mixed", or of "union" (all domains)."""
    rng = np.random.default_rng(seed)
    if domain == "union":
        names = list(DOMAINS)
        return [DOMAINS[str(rng.choice(names))].sample(rng) for _ in range(count)]
    chosen = MIXED if domain == "mixed" else DOMAINS[domain]
    return [chosen.sample(rng) for _ in range(count)]


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a scene: (64, 64, 3) uint8.

    rng: varies places, sizes, angles, phases and shades; attributes do not vary
    """
    image = _background(scene, rng)
    for place, thing in scene.places.items():
        _draw(image, thing, place, rng)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def render_all(scenes: list[Scene], seed: int) -> Iterator[NDArray[np.uint8]]:
    """Draw scenes one by one; scene i depends on (seed, i) only."""
    for index, scene in enumerate(scenes):
        yield render(scene, np.random.default_rng((seed, index)))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _soft(wave: Array) -> Array:
    """Return a wave whose edges are about a pixel wide."""
    return np.clip(wave * 2.5 + 0.5, 0, 1)


def _background(scene: Scene, rng: np.random.Generator) -> Array:
    axis = np.arange(SIZE, dtype=np.float32)
    x, y = np.meshgrid(axis + rng.uniform(0, 64), axis + rng.uniform(0, 64))
    dark = TEXTURES[scene.texture](x, y)[..., None]
    base = np.asarray(GROUNDS[scene.ground], np.float32) * rng.uniform(0.95, 1.05)
    return (base * (1 - 0.3 * dark)).astype(np.float32)


def _draw(image: Array, thing: Thing, place: str, rng: np.random.Generator) -> None:
    """Blend one shape into the image; supersampling anti-aliases its edge."""
    jitter = (2.0, 5.0) if place in ("left", "right") else (5.0, 2.0)
    centre = np.asarray(CENTRES[place]) + rng.uniform(-1, 1, 2) * jitter
    radius, angle = rng.uniform(11.5, 13.5), np.deg2rad(rng.uniform(-10, 10))
    left, top = (max(int(edge - radius) - 1, 0) for edge in centre)
    right, bottom = (min(int(edge + radius) + 3, SIZE) for edge in centre)
    u = (_subpixels(left, right) - centre[0]) / radius
    v = (_subpixels(top, bottom) - centre[1]) / radius
    x, y = np.meshgrid(u * np.cos(angle), v * np.cos(angle))
    x, y = x + v[:, None] * np.sin(angle), y - u * np.sin(angle)
    inside = SHAPES[thing.shape](x, y)
    cover = inside.reshape(bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING).mean(
        (1, 3), dtype=np.float32
    )
    colour = np.asarray(COLOURS[thing.colour], np.float32) + rng.uniform(-10, 10, 3)
    patch = image[top:bottom, left:right]
    patch += cover[..., None] * (colour - patch)


def _subpixels(start: int, stop: int) -> Array:
    """Return the centres of the subpixels of pixels start … stop-1."""
    return (np.arange(start * SUPERSAMPLING, stop * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING


def draw(folder: Path, domain: str, count: int, seed: int) -> None:
    """Write `count` PNGs and metadata.jsonl of one domain, of "mixed" or of "union", all or nothing."""
    scenes = sample_scenes(domain, count, seed)
    with staged(folder, last="metadata.jsonl") as stage:
        lines = []
        for index, (scene, image) in enumerate(zip(scenes, render_all(scenes, seed), strict=True)):
            name = f"{index:05d}.png"
            Image.fromarray(image).save(stage / name)
            lines.append(json.dumps({"file_name": name, "text": scene.caption}))
        (stage / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m afa.demo.scenes", description=__doc__)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--domain", default="mixed", choices=[*DOMAINS, "mixed", "union"])
    flags.add_argument("--count", type=int, default=200)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    draw(given.folder, given.domain, given.count, given.seed)
    print(f"{given.count} captioned images in {given.folder}")


if __name__ == "__main__":
    main()
