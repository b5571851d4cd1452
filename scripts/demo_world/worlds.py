"""What differs between the two embedded worlds when they are made."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from afa.demo import metric, near_scenes, near_scorer, scenes, scorer
from scripts.demo_world.fit import Schedule

WORDS = "a an left right of above below on background the with and".split()


@dataclass(frozen=True)
class World:
    """One embedded world.

    prefix:      of its folders
    words:       of its captions; each is one token
    sample:      (domain, count, seed) -> scenes
    everything:  (count, seed) -> scenes of every combination, for the parts that judge
    render_all:  (scenes, seed) -> images (64, 64, 3) uint8
    labels:      scenes -> (n, questions) int64
    classes:     question -> its answers
    scorer:      makes the scorer's network
    reward:      makes the reward's network
    unet:        makes the denoiser
    experts:     name -> the domain it trains on
    tunes_text:  the models that train the text encoder too
    base_steps:  schedule of the base; expert_steps: of each expert; scorer_steps, reward_steps: of the judges
    training:    number of scenes that the base trains on, and each expert
    """

    name: str
    prefix: str
    words: tuple[str, ...]
    sample: Callable[[str, int, int], Sequence[Any]]
    everything: Callable[[int, int], Sequence[Any]]
    render_all: Callable[[Any, int], Iterator[Any]]
    labels: Callable[[Any], Tensor]
    classes: Mapping[str, Sequence[str]]
    scorer: Callable[[], nn.Module]
    reward: Callable[[], nn.Module]
    unet: Callable[[], UNet2DConditionModel]
    experts: Mapping[str, str]
    tunes_text: tuple[str, ...]
    base_steps: Schedule
    expert_steps: Schedule
    scorer_steps: Schedule
    reward_steps: Schedule
    training: tuple[int, int]

    def draw(self, chosen: Sequence[Any], seed: int) -> Tensor:
        """Draw scenes: (n, 3, 64, 64) uint8."""
        images = torch.from_numpy(np.stack(list(self.render_all(chosen, seed))))
        return images.permute(0, 3, 1, 2).contiguous()

    def answers(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Split logits by the questions of the classes."""
        return scorer.answers_of(logits, self.classes)


EVERYTHING = scenes.Domain(scenes.SHAPES, scenes.SHAPES, tuple(scenes.TEXTURES))  # no expert has seen all


def sample_everything(count: int, seed: int) -> list[scenes.Scene]:
    """Draw scenes of the far world with every combination of attributes."""
    rng = np.random.default_rng(seed)
    return [EVERYTHING.sample(rng) for _ in range(count)]


def far_unet() -> UNet2DConditionModel:
    """2.2 M parameters in Stable Diffusion's layout: two levels, attention to the text on the lower one."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def near_unet() -> UNet2DConditionModel:
    """1.4 M parameters in Stable Diffusion's layout: three levels, attention to the text on the middle one."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )


FAR = World(
    name="far",
    prefix="",
    words=(*scenes.SHAPES, *scenes.COLOURS, *scenes.GROUNDS, *scenes.TEXTURES, *WORDS),
    sample=scenes.sample_scenes,
    everything=sample_everything,
    render_all=scenes.render_all,
    labels=scorer.labels,
    classes=scorer.CLASSES,
    scorer=scorer.network,
    reward=metric.network,
    unet=far_unet,
    experts={name: name for name in scenes.DOMAINS},
    tunes_text=("patterns",),
    base_steps=Schedule(900, 1e-3, batch=64, average=0.999, warm_up=200),
    expert_steps=Schedule(1200, 7e-4, batch=64, average=0.999),  # equal effort for each
    scorer_steps=Schedule(1000, 2e-3, batch=64),
    reward_steps=Schedule(1600, 2e-3, batch=64),
    training=(12_000, 12_000),
)

NEAR = World(
    name="near",
    prefix="near-",
    words=(
        *near_scenes.SHAPES,
        *near_scenes.SIZES,
        *scenes.COLOURS,
        *scenes.GROUNDS,
        *scenes.TEXTURES,
        *"a an left of above on background and".split(),
    ),
    sample=near_scenes.sample_scenes,
    everything=lambda count, seed: near_scenes.sample_scenes("union", count, seed),
    render_all=near_scenes.render_all,
    labels=near_scorer.labels,
    classes=near_scorer.CLASSES,
    scorer=near_scorer.network,
    reward=near_scorer.reward_network,
    unet=near_unet,
    experts={name: f"{name} diet" for name in near_scenes.FAMILIES},
    tunes_text=("base",),
    base_steps=Schedule(4500, 1.5e-3, batch=64, average=0.999, warm_up=200),
    expert_steps=Schedule(700, 6e-4, batch=64, average=0.998),
    scorer_steps=Schedule(1600, 2e-3, batch=64),
    reward_steps=Schedule(1600, 2e-3, batch=64),
    training=(24_000, 10_000),
)
WORLDS = {world.name: world for world in (FAR, NEAR)}
