"""Small experts for the tests of sampling-time methods, and what they are asked."""

import numpy as np
from tiny import inputs, sd_pipeline

from afa import Ensemble
from afa.sampling.sample import Request, Sampling

UNET = {  # two levels are enough here
    "block_out_channels": (16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
SAMPLING = Sampling(steps=3, guidance=3.0, height=32, width=32)
CAT, DOG, FOX = Request("a cat", 1), Request("a dog", 7), Request("a fox", 3)


def pipelines(count, **changes):
    return [sd_pipeline(seed, **UNET, **changes) for seed in range(count)]


def together(pipes, **options):
    return Ensemble.from_experts(pipes, aggregator="mean", **options)


def differ(one, other):
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def joined_inputs(experts=3, batch=2):
    """Inputs of one pass with a part of the text for every expert."""
    return inputs(batch=batch, height=4, width=6, text_width=24 * experts)


def own(call, index):
    """The same with only one expert's part of the text."""
    return {**call, "encoder_hidden_states": call["encoder_hidden_states"][..., 24 * index : 24 * (index + 1)]}
