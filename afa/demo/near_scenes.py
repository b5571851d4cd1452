"""Scenes of the near world: one to three coloured shapes of two sizes; a few cover each other.

The experts of this world are near their base and near each other, as fine-tunes of one community base are.
Each has trained above all on one family of shapes; mixed scenes have one shape of each family. A scene is a
set of attributes. Its caption and its image (64×64 pixels) follow from them.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afa.demo.drawing import COLOURS, GROUNDS, TEXTURES, as_pixels, background, draw_shape
from afa.demo.scenes import article

FAMILIES = {
    "round": ("circle", "ring", "moon", "heart"),
    "sharp": ("triangle", "star", "cross", "diamond"),
    "signs": ("arrow", "house", "bolt", "hourglass"),
}
SHAPES = tuple(shape for family in FAMILIES.values() for shape in family)
SIZES = {"big": (14.0, 15.5), "small": (10.5, 11.5)}  # smallest and largest radius in pixels
OWN = 0.78  # share of an expert's training scenes that show its own family alone

# Layouts: words between the things of a caption -> the centre of each thing in pixels, x then y.
LAYOUTS: dict[tuple[str, ...], tuple[tuple[float, float], ...]] = {
    (): ((32, 32),),
    ("left of",): ((17, 32), (47, 32)),
    ("above",): ((32, 17), (32, 47)),
    ("and", "above"): ((18.5, 19.5), (45.5, 19.5), (32, 45)),
    ("above", "and"): ((32, 19), (18.5, 44.5), (45.5, 44.5)),
}
JITTER = {1: 7.0, 2: 4.0, 3: 2.5}  # pixels by which centres vary, by the number of things
COUNTS = (0.25, 0.35, 0.40)  # of training scenes, the share with one, two and three things


@dataclass(frozen=True)
class SizedThing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{article(self.size)} {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class NearScene:
    """All that a caption says: one to three things of different colours, their layout, and the background."""

    things: tuple[SizedThing, ...]
    layout: tuple[str, ...]
    texture: str
    ground: str

    @property
    def caption(self) -> str:
        words = [str(self.things[0])]
        for between, thing in zip(self.layout, self.things[1:], strict=True):
            words += [between, str(thing)]
        return f"{' '.join(words)} on a {self.texture} {self.ground} background"


def sample(families: list[str], rng: np.random.Generator) -> NearScene:
    """Draw a scene with one thing of each family at random, in any order; their colours differ."""
    colours = rng.choice(list(COLOURS), len(families), replace=False)
    things = [
        SizedThing(str(rng.choice(list(SIZES))), str(colour), str(rng.choice(FAMILIES[family])))
        for family, colour in zip(rng.permutation(families), colours, strict=True)
    ]
    layouts = [layout for layout in LAYOUTS if len(layout) == len(families) - 1]
    return NearScene(
        tuple(things),
        layouts[int(rng.integers(len(layouts)))],
        str(rng.choice(list(TEXTURES))),
        str(rng.choice(list(GROUNDS))),
    )


def sample_scenes(domain: str, count: int, seed: int) -> list[NearScene]:
    """Return `count` random scenes.

    domain: "mixed": three things, one of each family; a family's name: three things of it; "union": one to
            three things of any families; "single": one thing of any family; "FAMILY diet": what the expert of
            a family trains on
    Raises ValueError for another domain.
    """
    rng, names = np.random.default_rng(seed), list(FAMILIES)
    home = domain.removesuffix(" diet")
    if home not in ("mixed", "union", "single", *names) or (home != domain and home not in names):
        raise ValueError(f"the near world has no domain '{domain}'")

    def one() -> NearScene:
        if domain == "mixed":
            return sample(names, rng)
        if domain in FAMILIES:
            return sample([domain] * 3, rng)
        things = 1 if domain == "single" else int(rng.choice(3, p=COUNTS)) + 1
        if home in FAMILIES and rng.random() < OWN:
            return sample([home] * things, rng)
        return sample([str(name) for name in rng.choice(names, things)], rng)

    return [one() for _ in range(count)]


def parse(caption: str) -> NearScene:
    """Return the scene that a caption describes. Raises ValueError for other words."""
    thing = r"an? (?P<size{0}>\w+) (?P<colour{0}>\w+) (?P<shape{0}>\w+)"
    more = r"(?: (?P<between{0}>left of|above|and) " + thing + ")?"
    found = re.fullmatch(
        thing.format(0)
        + more.format(1)
        + more.format(2)
        + r" on a (?P<texture>\w+) (?P<ground>\w+) background",
        caption.strip(),
    )
    if found:
        there = [k for k in range(3) if found[f"shape{k}"]]
        things = tuple(SizedThing(found[f"size{k}"], found[f"colour{k}"], found[f"shape{k}"]) for k in there)
        scene = NearScene(
            things, tuple(found[f"between{k}"] for k in there[1:]), found["texture"], found["ground"]
        )
        if _known(scene):
            return scene
    raise ValueError(
        f"'{caption}' is not a caption of the near world, such as '{sample_scenes('mixed', 1, 0)[0].caption}'"
    )


def _known(scene: NearScene) -> bool:
    return (
        scene.layout in LAYOUTS
        and scene.texture in TEXTURES
        and scene.ground in GROUNDS
        and len({thing.colour for thing in scene.things}) == len(scene.things)
        and all(
            thing.size in SIZES and thing.colour in COLOURS and thing.shape in SHAPES
            for thing in scene.things
        )
    )


def render(scene: NearScene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a scene: (64, 64, 3) uint8.

    rng: varies places, sizes, angles, phases, shades, and which thing covers another; attributes do not vary
    """
    image = background(scene.texture, scene.ground, rng)
    centres, jitter = LAYOUTS[scene.layout], JITTER[len(scene.things)]
    for k in rng.permutation(len(scene.things)):
        thing, centre = scene.things[k], np.asarray(centres[k]) + rng.uniform(-jitter, jitter, 2)
        draw_shape(image, thing.shape, thing.colour, centre, SIZES[thing.size], rng)
    return as_pixels(image)
