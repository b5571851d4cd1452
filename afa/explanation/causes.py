"""What the weights owe to a word: the same latents again, with the word hidden from the aggregators."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.switches import hide_tokens, watch_weights
from afa.explanation.recording import Recording
from afa.explanation.words import Word


@dataclass(frozen=True)
class Effects:
    """What hiding each word changes, means over some passes, all fused stages and all places. passes: of the recording.

    moved (U,): the share of the weight that changes hands, half the sum of |changes| over experts; from 0 to 1.
    pull (U, N): weight with the word minus weight without it; above 0: the word calls for the expert. 0 in sum over experts.
    places (U, h, w): moved, place by place, on the largest fused map. together: moved if all words are hidden.
    """

    passes: tuple[int, ...]
    moved: NDArray[np.float64]
    pull: NDArray[np.float64]
    places: NDArray[np.float32]
    together: float


def effects(denoiser: EnsembleDenoiser, recording: Recording, words: Sequence[Word], count: int = 4) -> Effects:
    """Run `count` recorded passes again, spread evenly over the steps, once with all words and once without each.

    Nothing but the aggregators' sight of the word's tokens changes; its experts read the whole prompt. Costs count · (U + 2) passes
    without guidance, where U is how many words there are.
    """
    chosen = np.unique(np.linspace(0, len(recording.calls) - 1, count + 2)[1:-1].round().astype(int)) if count else []
    every = {token for word in words for token in word.tokens}
    hidden = [set(word.tokens) for word in words]
    side = max((maps.shape[-2:] for maps in recording.maps.values()), key=lambda size: size[0] * size[1])
    found = [_effect(denoiser, recording.calls[index], [*hidden, every], (side[0], side[1])) for index in chosen]
    moved, pull, places = (torch.stack([one[part] for one in found]).mean(0).numpy() for part in range(3))
    return Effects(tuple(int(index) for index in chosen), moved[:-1].astype(float), pull[:-1].astype(float), places[:-1], float(moved[-1]))


def _effect(
    denoiser: EnsembleDenoiser, call: dict[str, Any], hidden: Sequence[Collection[int]], side: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one pass, for each set of hidden tokens: moved, pull (, N), places (, h, w)."""
    whole = weights_without(denoiser, call, ())
    rows = []
    for tokens in hidden:
        changes = [maps - without for maps, without in zip(whole, weights_without(denoiser, call, tokens), strict=True)]  # with - without
        moved = torch.stack([_resized(change.abs().sum(0) / 2, side) for change in changes]).mean(0)
        pull = torch.stack([change.mean((1, 2)) for change in changes]).mean(0)
        rows.append((torch.stack([change.abs().sum(0).mean() / 2 for change in changes]).mean(), pull, moved))
    moved_, pulls, places = zip(*rows, strict=True)
    return torch.stack(moved_), torch.stack(pulls), torch.stack(places)


def weights_without(denoiser: EnsembleDenoiser, call: dict[str, Any], tokens: Collection[int]) -> list[Tensor]:
    """The weights (N, h, w) of every fused stage in one pass whose aggregators do not see some tokens."""
    maps: list[Tensor] = []
    with torch.no_grad(), hide_tokens(denoiser, tokens), watch_weights(denoiser, lambda _, weights: maps.append(weights[-1].float().cpu())):
        denoiser(**call)
    return maps


def _resized(places: Tensor, side: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(places[None, None], size=side, mode="bilinear", align_corners=False)[0, 0]
