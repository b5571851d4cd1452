"""Features on their way past the stages of one expert, looked at in a few places of the image."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.families.stage import Stage, Trace

PLACES = 16  # of an image, the same at every stage and for every expert
SEED = 5


class Tapped:
    """A stage that shows what it puts out; in all else it is the one it stands for."""

    def __init__(self, stage: Stage, seen: dict[str, Tensor]) -> None:
        self._stage, self._seen = stage, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def run(self, hidden: Tensor, trace: Trace, skip: Tensor | None = None, size: tuple[int, int] | None = None) -> tuple[Tensor, Trace]:
        features, after = self._stage.run(hidden, trace, skip, size)
        self._seen[self._stage.name] = at_places(features).float().cpu()
        return features, after


@contextmanager
def tapped(denoiser: EnsembleDenoiser) -> Iterator[dict[str, Tensor]]:
    """Inside, a pass leaves its features here: by stage, (B, C, PLACES) float32; each pass those of the last one's place."""
    seen: dict[str, Tensor] = {}
    before = denoiser.columns
    denoiser.columns = [tuple(Tapped(stage, seen) for stage in column) for column in before]  # type: ignore[misc]
    try:
        yield seen
    finally:
        denoiser.columns = before


def at_places(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, PLACES): the same parts of the image whatever the size of the map."""
    height, width = features.shape[-2:]
    spots = torch.rand(2, PLACES, generator=torch.Generator().manual_seed(SEED))
    rows, columns = (spots[0] * height).long().to(features.device), (spots[1] * width).long().to(features.device)
    return features[:, :, rows, columns]
