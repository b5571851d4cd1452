"""What the image would be, from the same noise, if the weights were others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.switches import adjust_weights, scale_weights
from afa.explanation.recording import Recording
from afa.explanation.settings import COUNTERFACTUALS
from afa.generation.sample import Request, Sampling, sample
from afa.lookup import look_up

Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Counterfactual:
    """kind: of COUNTERFACTUALS. title: what was changed. image (H, W, 3) uint8. rmse: from the image as it is, in levels of 255."""

    kind: str
    title: str
    image: NDArray[np.uint8]
    rmse: float


def counterfactuals(
    pipeline: Any, denoiser: EnsembleDenoiser, recording: Recording, request: Request, sampling: Sampling, kinds: Sequence[str]
) -> Iterator[Counterfactual]:
    """One image after another; with guidance, the weights of both halves are changed. Raises ValueError for an unknown kind."""
    for kind in kinds:
        for title, change in look_up(kind, CHANGES, "counterfactual")(denoiser, recording):
            with change():
                image = sample(pipeline, [request], sampling)[0]
            yield Counterfactual(kind, title, image, rmse(recording.image, image))


def rmse(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Root of the mean squared difference of two images' channels, in levels from 0 to 255."""
    return float(np.sqrt(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)))


def _off(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """Each expert without its weight, which the others share as they share the rest."""
    for name in denoiser.names:
        yield f"{name} off", lambda name=name: scale_weights(denoiser, {name: 0.0})  # type: ignore[misc]


def _swapped(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """Every expert plays the part of the one before it; of two, each the other's."""
    names = denoiser.names
    order = [(index - 1) % len(names) for index in range(len(names))]
    title = " <-> ".join(names) if len(names) == 2 else "every expert in the next one's place"
    yield title, lambda: adjust_weights(denoiser, permuted(denoiser, order))


def _pairs(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """Two experts play each other's part."""
    for one, other in combinations(range(len(denoiser.names)), 2):
        order = list(range(len(denoiser.names)))
        order[one], order[other] = other, one
        title = f"{denoiser.names[one]} <-> {denoiser.names[other]}"
        yield title, lambda order=order: adjust_weights(denoiser, permuted(denoiser, order))  # type: ignore[misc]


def _frozen(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """First without places, then without steps, too."""
    yield "one weight for all places", lambda: adjust_weights(denoiser, without_places)
    yield "... and for all steps", lambda: adjust_weights(denoiser, constant(denoiser, recording))


def _equal(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    yield "equal weights", lambda: adjust_weights(denoiser, lambda _, weights: torch.full_like(weights, 1 / weights.shape[1]))


# kind, as in COUNTERFACTUALS -> (denoiser, recording) -> titles and what to switch on; "skipped" is in skipping.py: it needs all images
CHANGES: dict[str, Callable[[EnsembleDenoiser, Recording], Iterator[tuple[str, Change]]]] = {
    "off": _off,
    "swapped": _swapped,
    "pairs": _pairs,
    "frozen": _frozen,
    "equal": _equal,
}
assert set(CHANGES) < set(COUNTERFACTUALS)


def permuted(denoiser: EnsembleDenoiser, order: Sequence[int]) -> Callable[[str, Tensor], Tensor]:
    """Expert n plays the part of expert order[n]: it gets that one's weights and, where everyone has a blend of its own, that one's blend."""

    def change(stage: str, weights: Tensor) -> Tensor:
        swapped = weights[:, list(order)]
        if denoiser.aggregators[stage].own_blends:
            swapped = swapped.unflatten(0, (-1, len(order)))[:, list(order)].flatten(0, 1)
        return swapped

    return change


def without_places(stage: str, weights: Tensor) -> Tensor:
    """Every map at its mean."""
    return weights.mean((2, 3), keepdim=True).expand_as(weights)


def constant(denoiser: EnsembleDenoiser, recording: Recording) -> Callable[[str, Tensor], Tensor]:
    """Every stage at its recorded mean over places and passes, each half of guidance at its own."""
    means: Mapping[tuple[bool, str], Tensor] = {key: rows.mean(0) for key, rows in recording.rows.items()}

    def change(stage: str, weights: Tensor) -> Tensor:
        return means[denoiser.aside, stage].to(weights)[:, :, None, None].expand_as(weights)

    return change
