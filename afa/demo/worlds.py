"""The two embedded worlds: their scenes, their models, and what judges them.

In the far world the experts have drifted so far apart that averaging their weights destroys them. In the near
world they are near their base and each other, as fine-tunes of one community base are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from afa.demo import near_scenes, near_scorer, scenes, scorer
from afa.places import ASSETS


class SceneScorer(Protocol):
    """What judges images of a world."""

    def score(self, images: NDArray[np.uint8], captions: list[str]) -> dict[str, NDArray[np.float64]]:
        """Return values (n,) by name, from images (n, 64, 64, 3)."""

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return features (n, D)."""


@dataclass(frozen=True, eq=False)
class World:
    """One embedded world.

    name:    far or near
    prefix:  of its files in the assets
    experts: their names
    sample:  (domain, count, seed) -> scenes; "mixed" is what no expert has trained on most
    render:  scene, random numbers -> image (64, 64, 3) uint8
    parse:   caption -> scene; raises ValueError for other words
    labels:  scenes -> the true class of each question (n, questions) int64
    classes: question -> its possible answers
    network: makes the scorer's network; reward_network: the reward's
    scorer:  makes a scorer of such a network
    scores:  names of the scorer's values; the first leads
    """

    name: str
    prefix: str
    experts: tuple[str, ...]
    sample: Callable[[str, int, int], Sequence[Any]]
    render: Callable[[Any, np.random.Generator], NDArray[np.uint8]]
    parse: Callable[[str], Any]
    labels: Callable[[Any], Tensor]
    classes: Mapping[str, tuple[str, ...]]
    network: Callable[[], nn.Module]
    reward_network: Callable[[], nn.Module]
    scorer: Callable[[Any], SceneScorer]
    scores: tuple[str, ...]

    def folder(self, name: str) -> Path:
        """Return the place of the base or an expert."""
        return ASSETS / f"{self.prefix}{name}"

    def file(self, name: str) -> Path:
        """Return the place of the weights of "scorer" or "reward"."""
        return ASSETS / f"{self.prefix}{name}.safetensors"

    def render_all(self, chosen: Sequence[Any], seed: int) -> Iterator[NDArray[np.uint8]]:
        """Draw scenes one by one; scene i depends on (seed, i) only."""
        for index, scene in enumerate(chosen):
            yield self.render(scene, np.random.default_rng((seed, index)))

    def load_reward(self) -> nn.Module:
        """Load the network of the shipped reward."""
        return load_network(self.reward_network(), self.file("reward"))


@lru_cache(maxsize=2)
def load_scorer(world: World) -> SceneScorer:
    """Load the shipped scorer of a world."""
    return world.scorer(load_network(world.network(), world.file("scorer")))


def load_network(net: nn.Module, file: Path) -> nn.Module:
    """Fill a network from a file of whatever precision, and freeze it."""
    from safetensors.torch import load_file

    net.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return net.eval().requires_grad_(False)


FAR = World(
    name="far",
    prefix="",
    experts=tuple(scenes.DOMAINS),
    sample=scenes.sample_scenes,
    render=scenes.render,
    parse=scenes.parse,
    labels=scorer.labels,
    classes=scorer.CLASSES,
    network=scorer.network,
    reward_network=scorer.reward_network,
    scorer=scorer.AttributeScorer,
    scores=scorer.SCORES,
)
NEAR = World(
    name="near",
    prefix="near-",
    experts=tuple(near_scenes.FAMILIES),
    sample=near_scenes.sample_scenes,
    render=near_scenes.render,
    parse=near_scenes.parse,
    labels=near_scorer.labels,
    classes=near_scorer.CLASSES,
    network=near_scorer.network,
    reward_network=near_scorer.reward_network,
    scorer=near_scorer.NearScorer,
    scores=near_scorer.SCORES,
)
WORLDS = {world.name: world for world in (FAR, NEAR)}
