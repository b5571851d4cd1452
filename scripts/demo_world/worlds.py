"""How the two embedded worlds are made: networks, schedules, and what each model trains on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from afa.demo import near_scenes, scenes
from afa.demo.drawing import COLOURS, GROUNDS, TEXTURES
from afa.demo.worlds import FAR, NEAR, World
from scripts.demo_world.fit import Schedule


@dataclass(frozen=True)
class WorldPlan:
    """How one world is made.

    words:       of its captions; each is one token
    everything:  (count, seed) -> scenes of every combination, for the parts that judge
    unet:        makes the denoiser
    domains:     the domain that each expert trains on
    tunes_text:  the models that train the text encoder too
    base_steps:  schedule of the base; expert_steps: of each expert; scorer_steps, reward_steps: of the judges
    training:    number of scenes that the base trains on, and each expert
    """

    world: World
    words: tuple[str, ...]
    everything: Callable[[int, int], Sequence[Any]]
    unet: Callable[[], UNet2DConditionModel]
    domains: Mapping[str, str]
    tunes_text: tuple[str, ...]
    base_steps: Schedule
    expert_steps: Schedule
    scorer_steps: Schedule
    reward_steps: Schedule
    training: tuple[int, int]

    def draw(self, chosen: Sequence[Any], seed: int) -> Tensor:
        """Draw scenes: (n, 3, 64, 64) uint8."""
        images = torch.from_numpy(np.stack(list(self.world.render_all(chosen, seed))))
        return images.permute(0, 3, 1, 2).contiguous()


EVERYTHING = scenes.Domain(scenes.SHAPES, scenes.SHAPES, tuple(TEXTURES))  # no expert has seen all


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


FAR_PLAN = WorldPlan(
    FAR,
    words=(
        *scenes.SHAPES,
        *COLOURS,
        *GROUNDS,
        *TEXTURES,
        *"a an left right of above below on background the with and".split(),
    ),
    everything=sample_everything,
    unet=far_unet,
    domains={name: name for name in FAR.experts},
    tunes_text=("patterns",),
    base_steps=Schedule(900, 1e-3, batch=64, average=0.999, warm_up=200),
    expert_steps=Schedule(1200, 7e-4, batch=64, average=0.999),  # equal effort for each
    scorer_steps=Schedule(1000, 2e-3, batch=64),
    reward_steps=Schedule(1600, 2e-3, batch=64),
    training=(12_000, 12_000),
)
NEAR_PLAN = WorldPlan(
    NEAR,
    words=(
        *near_scenes.SHAPES,
        *near_scenes.SIZES,
        *COLOURS,
        *GROUNDS,
        *TEXTURES,
        *"a an left of above on background and".split(),
    ),
    everything=lambda count, seed: near_scenes.sample_scenes("union", count, seed),
    unet=near_unet,
    domains={name: f"{name} diet" for name in NEAR.experts},
    tunes_text=("base",),
    base_steps=Schedule(4500, 1.5e-3, batch=64, average=0.999, warm_up=200, last=2000),
    expert_steps=Schedule(600, 6e-4, batch=64, average=0.998),
    scorer_steps=Schedule(1600, 2e-3, batch=64),
    reward_steps=Schedule(1600, 2e-3, batch=64),
    training=(24_000, 10_000),
)
PLANS = {plan.world.name: plan for plan in (FAR_PLAN, NEAR_PLAN)}
