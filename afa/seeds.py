"""Seeds: whole numbers from 0 to 2**64 - 1, as torch's generators and other programs take them. Imports torch when a generator is made."""

import dataclasses
import secrets
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.settings import SEEDS

if TYPE_CHECKING:
    import torch

DRAW = -1  # asks for a seed that is drawn
NARROW = 2**32  # torch's generator of the CPU uses so many seeds: it drops the upper half of 64 bits


def nth_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a run that begins with `seed`: one more for each, from the last one on to 0."""
    return (seed + index) % SEEDS


def draw_seed() -> int:
    """One that was never used: below 2**32, which every program can take back."""
    return secrets.randbelow(NARROW)


def narrow(seed: int) -> int:
    """A seed that torch's generator of the CPU tells apart from others: itself below 2**32, else mixed to 32 bits."""
    return seed if seed < NARROW else int(np.random.SeedSequence(seed).generate_state(1)[0])


def generator(seed: int) -> "torch.Generator":
    """A generator of the CPU for this seed."""
    import torch

    return torch.Generator().manual_seed(narrow(seed))


def with_seed(settings: Any) -> Any:
    """A command's settings with a seed of their own: for -1 one is drawn, and said on stderr so that it can be given again."""
    if settings.seed != DRAW:
        return settings
    seed = draw_seed()
    print(f"seed {seed}, drawn; give --seed {seed} to have the same again", file=sys.stderr)
    return dataclasses.replace(settings, seed=seed)
