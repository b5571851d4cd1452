"""Scenes of the far world: exactly drawn, captioned scenes of two coloured shapes on a textured background.

A scene is a set of attributes. Its caption and its image (64×64 pixels) follow from them, so an image can be
judged attribute by attribute (see scorer.py).
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afa.demo.drawing import COLOURS, GROUNDS, TEXTURES, as_pixels, background, draw_shape

SHAPES = ("circle", "ring", "moon", "heart", "square", "triangle", "star", "cross", "diamond")
RADII = (11.5, 13.5)  # pixels
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
            f"{article(thing.colour)} {thing.colour} {thing.shape}" for thing in (self.first, self.second)
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
        known = {colour, other_colour} <= COLOURS.keys() and {shape, other_shape} <= {*SHAPES}
        if known and relation in RELATIONS and texture in TEXTURES and ground in GROUNDS:
            return Scene(Thing(shape, colour), Thing(other_shape, other_colour), relation, texture, ground)
    raise ValueError(
        f"'{caption}' is not a caption of the far world, such as '{sample_scenes('mixed', 1, 0)[0].caption}'"
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
    image = background(scene.texture, scene.ground, rng)
    for place, thing in scene.places.items():
        jitter = (2.0, 5.0) if place in ("left", "right") else (5.0, 2.0)
        centre = np.asarray(CENTRES[place]) + rng.uniform(-1, 1, 2) * jitter
        draw_shape(image, thing.shape, thing.colour, centre, RADII, rng)
    return as_pixels(image)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
