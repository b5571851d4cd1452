"""Seeds: whole numbers from 0 to 2**64 - 1, as torch's generators and other programs take them.

torch is imported only when a generator is made.
"""

import dataclasses
import secrets
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.settings import SEEDS

if TYPE_CHECKING:
    import torch

DRAW = -1  # means: draw a seed
NARROW = 2**32  # number of seeds that torch's CPU generator distinguishes: it drops the upper 32 of 64 bits


def nth_seed(seed: int, index: int) -> int:
    """Return the seed of image `index` of a run that begins with `seed`: one more per image, modulo 2**64."""
    return (seed + index) % SEEDS


def draw_seed() -> int:
    """Draw a random seed below 2**32, which every program accepts."""
    return secrets.randbelow(NARROW)


def narrow(seed: int) -> int:
    """Reduce a seed to the 32 bits that torch's CPU generator uses: itself below 2**32, else a hash of it."""
    return seed if seed < NARROW else int(np.random.SeedSequence(seed).generate_state(1)[0])


def generator(seed: int) -> "torch.Generator":
    """Make torch's CPU generator for this seed."""
    import torch

    return torch.Generator().manual_seed(narrow(seed))


def with_seed(settings: Any) -> Any:
    """Replace seed -1 in a command's settings by a drawn one, and print that on stderr."""
    if settings.seed != DRAW:
        return settings
    seed = draw_seed()
    print(f"seed {seed}, drawn; give --seed {seed} to have the same again", file=sys.stderr)
    return dataclasses.replace(settings, seed=seed)
