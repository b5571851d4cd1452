"""What experts are asked: clean latents with their captions, and for each a step in every band, with several noises."""

from dataclasses import dataclass

import torch
from torch import Tensor

from afa.seeds import NARROW, narrow
from afa.training.noise import Noising
from afa.training.routing import BANDS


@dataclass(frozen=True)
class Probes:
    """latents (M, C, h, w): clean, as denoisers see them, on the CPU. captions (M). sizes (M, 6): SDXL's size conditions.

    digest: a hash of the images and captions.
    draws D: of noise, at every image and step. seed: of steps and noise; a point's numbers do not depend on how many points there are.
    """

    latents: Tensor
    captions: list[str]
    sizes: Tensor
    draws: int
    seed: int
    digest: str = ""

    def __len__(self) -> int:
        return len(self.captions)

    def steps(self, image: int, noising: Noising) -> Tensor:
        """One step in each band, drawn for this image: (BANDS,)."""
        rng = _stream(self.seed, image, 0)
        places = (torch.arange(BANDS) + torch.rand(BANDS, generator=rng)) / BANDS
        return (places * noising.steps).long().clamp(max=noising.steps - 1)

    def noise(self, image: int) -> Tensor:
        """(BANDS, D, C, h, w)."""
        rng = _stream(self.seed, image, 1)
        return torch.randn((BANDS, self.draws, *self.latents.shape[1:]), generator=rng)


def _stream(seed: int, image: int, which: int) -> torch.Generator:
    """A generator of its own for every seed, image and one of two uses."""
    mixed = (seed * 1_000_003 + image) * 2 + which
    return torch.Generator().manual_seed(mixed if seed < NARROW else narrow(mixed))
