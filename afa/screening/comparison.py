"""Head-room and agreement of experts, computed from their errors.

Learnable head-room is the share by which routing between experts could lower the loss of the best expert. For
each image and timestep, several noises are drawn, and all experts predict on the same noisy latents. At every
element of a held-out draw, the expert with the lowest squared error in most of the *other* draws is chosen.
Differences that depend on the noise alone cancel; a trained router could learn the differences that remain.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.screening.predict import AnswerStore
from afa.stats import Estimate, estimate, gain

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Routes:
    """Mean squared errors at one image and timestep, over all draws and elements.

    experts:        (N,) of each expert
    routed:         each element from the winner of the other draws
    routed_pixels:  the same with one winner for all channels of a place, as weight maps can express it
    mean:           of the mean of the experts' predictions
    sample_oracle:  of the best expert of each draw, chosen by its true error: a bound
    element_oracle: of the best expert of each element, chosen by its true error: a bound
    wins:           (N,) share of the elements that each expert wins; sums to 1
    agreement:      share of pairs of draws with the same winner, from 0 to 1
    """

    experts: Array
    routed: float
    routed_pixels: float
    mean: float
    sample_oracle: float
    element_oracle: float
    wins: Array
    agreement: float


def routes(errors: Tensor) -> Routes:
    """Compute the errors of all ways to route at one image and timestep.

    errors: (N, D, C, h, w) prediction minus target of N experts at D noises; ties go to the first expert
    Raises ValueError for fewer than two draws.
    """
    if errors.shape[1] < 2:
        raise ValueError(f"head-room needs at least two draws of noise, got {errors.shape[1]}")
    squared = errors.square()
    elements = squared.flatten(2)  # (N, D, C·h·w)
    pixels = squared.mean(2).flatten(2)  # (N, D, h·w)
    winners = elements.argmin(0)
    counts = _counts(winners, len(errors))
    draws = errors.shape[1]
    agreement = (counts * (counts - 1)).sum(0).double().mean() / (draws * (draws - 1))
    return Routes(
        experts=elements.double().mean((1, 2)).numpy(),
        routed=_routed(elements, winners, counts),
        routed_pixels=routed(pixels),
        mean=float(errors.mean(0).square().double().mean()),
        sample_oracle=float(elements.double().mean(2).amin(0).mean()),
        element_oracle=float(elements.amin(0).double().mean()),
        wins=(counts.double().mean(1) / draws).numpy(),
        agreement=float(agreement),
    )


def routed(squared: Tensor) -> float:
    """Return the mean squared error if each element comes from the winner of the other draws.

    squared: (N, D, E) squared errors; ties go to the first expert
    """
    winners = squared.argmin(0)
    return _routed(squared, winners, _counts(winners, len(squared)))


def _routed(squared: Tensor, winners: Tensor, counts: Tensor) -> float:
    total = 0.0
    for draw, won in enumerate(winners):
        others = counts.clone()
        others[won, torch.arange(len(won))] -= 1
        total += float(squared[:, draw].gather(0, others.argmax(0)[None]).double().mean())
    return total / len(winners)


def _counts(winners: Tensor, experts: int) -> Tensor:
    """Count how often each expert wins each element: winners (D, E) -> (N, E)."""
    return torch.stack([(winners == expert).sum(0) for expert in range(experts)])


def chance_agreement(wins: Array, weights: Sequence[float] | None = None) -> float:
    """Return how often two draws would have the same winner by chance: the sum of squared win rates.

    wins:    (images, N)
    weights: of the images; None: equal
    """
    rates = np.average(wins, axis=0, weights=weights)
    return float((rates**2).sum())


FEW = 60  # up to so many subsets of a size, all are tried


@dataclass
class ExpertComparison:
    """Compares the experts' answers at the same probes; only one image's answers are in memory at a time.

    names:  of the experts, in the order given
    stores: their answers
    """

    names: tuple[str, ...]
    stores: Sequence[AnswerStore]
    _routed: dict[tuple[int, ...], Array] = field(default_factory=dict)  # what routed() returned
    _apart: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # what apart() returned

    @property
    def images(self) -> int:
        return self.stores[0].shape[0]

    @property
    def bands(self) -> int:
        return self.stores[0].shape[1]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The indices of every two experts."""
        return list(combinations(range(len(self.names)), 2))

    @cached_property
    def losses(self) -> Array:
        """(N, M, BANDS) mean squared error of each expert."""

        def loss(store: AnswerStore, image: int) -> Any:
            return store.errors(image).square().double().mean((1, 2, 3, 4)).numpy()

        return np.stack([[loss(store, image) for image in range(self.images)] for store in self.stores])

    @cached_property
    def ranking(self) -> list[int]:
        """The indices of the experts, the lowest loss first."""
        return [int(place) for place in np.argsort(self.losses.mean((1, 2)), kind="stable")]

    @property
    def best(self) -> str:
        return self.names[self.ranking[0]]

    @cached_property
    def routes(self) -> list[list[Routes]]:
        """The routes of each image and band; experts are in the order of ranking."""
        return [
            [routes(errors) for errors in self._errors(self.ranking, image)] for image in range(self.images)
        ]

    def values(self, name: str) -> Array:
        """Return one field of all routes: (M, BANDS)."""
        return np.array([[getattr(found, name) for found in bands] for bands in self.routes])

    def wins(self) -> Array:
        """Return the win rates (N, M, BANDS), experts in the order given."""
        return np.moveaxis(self.values("wins"), -1, 0)[np.argsort(self.ranking)]

    def gains(self, losses: Array) -> tuple[Estimate, list[Estimate]]:
        """Compute the gain 1 - loss / loss of the best expert, over all bands and in each band.

        losses: (M, BANDS)
        The best expert is the one with the lowest loss over all bands.
        """
        overall = gain(losses.mean(1), self.losses.mean(2))
        best = self.losses[self.ranking[0]]
        return overall, [gain(losses[:, band], best[None, :, band]) for band in range(self.bands)]

    def agreement(self) -> list[tuple[Estimate, float]]:
        """Return for each band how often two draws have the same winner: observed, and by chance."""
        wins, observed = self.wins(), self.values("agreement")
        return [
            (estimate(observed[:, band]), chance_agreement(wins[:, :, band].T)) for band in range(self.bands)
        ]

    def routed(self, members: Sequence[int]) -> Array:
        """Return the loss (M, BANDS) of routing between some experts, one winner for all channels of a place.

        members: indices of the experts; the loss of a single expert is its own
        """
        ordered = tuple(sorted(members, key=self.ranking.index))
        if len(ordered) == 1:
            return self.losses[ordered[0]]
        if len(ordered) == len(self.names):
            return self.values("routed_pixels")
        if ordered not in self._routed:
            rows = [
                [routed(errors.square().mean(2).flatten(2)) for errors in self._errors(ordered, image)]
                for image in range(self.images)
            ]
            self._routed[ordered] = np.array(rows)
        return self._routed[ordered]

    def greedy(self) -> list[tuple[int, ...]]:
        """Return a set of each size: the best expert first, then always the one that lowers the loss most."""
        chosen = [self.ranking[0]]
        path = [tuple(chosen)]
        while len(chosen) < len(self.names):
            rest = [place for place in self.ranking if place not in chosen]
            chosen = [*chosen, min(rest, key=lambda place: self.routed([*chosen, place]).mean())]
            path.append(tuple(chosen))
        return path

    def best_of_size(self, size: int) -> tuple[int, ...]:
        """Return the best set of a size: among all sets if there are at most FEW, else the greedy one."""
        if comb(len(self.names), size) > FEW:
            return self.greedy()[size - 1]
        every = combinations(range(len(self.names)), size)
        return min(every, key=lambda members: float(self.routed(members).mean()))

    def apart(self, one: int, other: int) -> list[float]:
        """Return the RMS distance of two experts' predictions in each band, in units of their RMS error."""
        if (one, other) not in self._apart:
            gaps = []
            for image in range(self.images):
                gap = self.stores[one].errors(image) - self.stores[other].errors(image)
                gaps.append(gap.square().mean((1, 2, 3, 4)).numpy())
            errors = (self.losses[one] + self.losses[other]) / 2
            self._apart[one, other] = [float(value) for value in np.sqrt(np.mean(gaps, 0) / errors.mean(0))]
        return self._apart[one, other]

    def _errors(self, members: Sequence[int], image: int) -> list[torch.Tensor]:
        """Read the errors of some experts at one image: for each band (N, D, C, h, w)."""
        return list(torch.stack([self.stores[place].errors(image) for place in members], dim=1))
