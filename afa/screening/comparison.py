"""Head-room and agreement of experts, from their errors alone.

Learnable head-room: what routing could gain over the best expert, judged by structure that survives a change of noise.

For an image and a timestep several noises are drawn; all experts predict on the same noisy latents. At every element the expert
that won (least squared error) most often on the *other* draws answers for a held-out draw. What only the noise decides
cancels, so a trained router could learn what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.screening.asking import Store
from afa.stats import Estimate, estimate, gain

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Routes:
    """Mean squared errors at one image and timestep, over all draws and elements.

    experts (N,). routed: every element answered by the winner of the other draws. routed_pixels: the same with one winner for all channels
    of a place, which is all that weight maps can express. mean: of the experts' predictions. sample_oracle, element_oracle: the best
    expert of a draw, of an element, chosen with the truth: upper bounds only. wins (N,): shares of the elements. agreement: how often the
    winners of two draws are the same.
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
    """errors (N, D, C, h, w): prediction minus target of N experts at D noises, the best expert first: ties go to it.

    Raises ValueError for fewer than two draws: none would be left to learn from.
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
    """Squared errors (N, D, E), the best expert first -> the mean where each element's winner of the other draws answers for a draw."""
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
    """(D, E) -> how often each expert won each element, (N, E)."""
    return torch.stack([(winners == expert).sum(0) for expert in range(experts)])


def chance_agreement(wins: Array, weights: Sequence[float] | None = None) -> float:
    """How often two draws would agree if only win rates mattered: the sum of squared win rates. wins (images, N)."""
    rates = np.average(wins, axis=0, weights=weights)
    return float((rates**2).sum())


FEW = 60  # sets of experts, all of which are tried


@dataclass
class Comparison:
    """Experts' answers at the same probes. names, stores: in the order given; images M, bands as asked.

    The answers of one image are in memory at a time.
    """

    names: tuple[str, ...]
    stores: Sequence[Store]

    @property
    def images(self) -> int:
        return self.stores[0].shape[0]

    @property
    def bands(self) -> int:
        return self.stores[0].shape[1]

    @cached_property
    def losses(self) -> Array:
        """(N, M, BANDS): the mean squared error of each expert."""
        return np.stack(
            [[self._losses(store, image) for image in range(self.images)] for store in self.stores]
        )

    @cached_property
    def ranking(self) -> list[int]:
        """The experts, the lowest loss first."""
        return [int(place) for place in np.argsort(self.losses.mean((1, 2)), kind="stable")]

    @property
    def best(self) -> str:
        return self.names[self.ranking[0]]

    @cached_property
    def routes(self) -> list[list[Routes]]:
        """By image and band, experts in the order of ranking."""
        return [
            [routes(errors) for errors in self._errors(self.ranking, image)] for image in range(self.images)
        ]

    def values(self, name: str) -> Array:
        """One number of the routes: (M, BANDS)."""
        return np.array([[getattr(found, name) for found in bands] for bands in self.routes])

    def wins(self) -> Array:
        """(N, M, BANDS) in the order given."""
        found = np.array([[bands.wins for bands in image] for image in self.routes])  # (M, BANDS, N)
        return np.moveaxis(found, -1, 0)[np.argsort(self.ranking)]

    def gains(self, losses: Array) -> tuple[Estimate, list[Estimate]]:
        """1 - losses (M, BANDS) over the best expert's: of all bands, of each. The best one is the best of all bands."""
        overall = gain(losses.mean(1), self.losses.mean(2))
        best = self.losses[self.ranking[0]]
        return overall, [gain(losses[:, band], best[None, :, band]) for band in range(self.bands)]

    def agreement(self) -> list[tuple[Estimate, float]]:
        """By band: how often the winners of two draws are the same, and how often they would be by chance."""
        wins = self.wins()
        observed = self.values("agreement")
        return [
            (estimate(observed[:, band]), chance_agreement(wins[:, :, band].T)) for band in range(self.bands)
        ]

    def routed(self, members: Sequence[int]) -> Array:
        """The routed loss (M, BANDS) of some of the experts, pixels: one winner for all channels of a place. One expert: its own."""
        ordered = tuple(sorted(members, key=self.ranking.index))
        if len(ordered) == 1:
            return self.losses[ordered[0]]
        if ordered not in self._routed:
            rows = [
                [self._routed_pixels(errors) for errors in self._errors(ordered, image)]
                for image in range(self.images)
            ]
            self._routed[ordered] = np.array(rows)
        return self._routed[ordered]

    @cached_property
    def _routed(self) -> dict[tuple[int, ...], Array]:
        return {tuple(self.ranking): self.values("routed_pixels")}

    @staticmethod
    def _routed_pixels(errors: torch.Tensor) -> float:
        return routed(errors.square().mean(2).flatten(2))

    def greedy(self) -> list[tuple[int, ...]]:
        """The best set of each size, from the best expert on, adding the one that lowers the routed loss most."""
        chosen = [self.ranking[0]]
        path = [tuple(chosen)]
        while len(chosen) < len(self.names):
            rest = [place for place in self.ranking if place not in chosen]
            chosen = [*chosen, min(rest, key=lambda place: self.routed([*chosen, place]).mean())]
            path.append(tuple(chosen))
        return path

    def best_of_size(self, size: int) -> tuple[int, ...]:
        """Of all sets of that size where they are few, else the greedy one."""
        if comb(len(self.names), size) > FEW:
            return self.greedy()[size - 1]
        return min(
            combinations(range(len(self.names)), size), key=lambda members: float(self.routed(members).mean())
        )

    def apart(self, one: int, other: int) -> list[float]:
        """How far two experts' predictions are apart, by band: root mean square, in units of what they are both wrong by."""
        pair = (min(one, other), max(one, other))
        if pair not in self._apart_by_pair:
            self._apart_by_pair[pair] = self._measured_apart(*pair)
        return self._apart_by_pair[pair]

    @cached_property
    def _apart_by_pair(self) -> dict[tuple[int, int], list[float]]:
        return {}

    def _measured_apart(self, one: int, other: int) -> list[float]:
        found = np.array([self._apart(one, other, image) for image in range(self.images)])  # (M, BANDS)
        errors = (self.losses[one] + self.losses[other]) / 2
        return [float(np.sqrt(value)) for value in found.mean(0) / errors.mean(0)]

    def _apart(self, one: int, other: int, image: int) -> Any:
        return (
            (self.stores[one].errors(image) - self.stores[other].errors(image))
            .square()
            .mean((1, 2, 3, 4))
            .numpy()
        )

    def _losses(self, store: Store, image: int) -> Any:
        return store.errors(image).square().double().mean((1, 2, 3, 4)).numpy()

    def _errors(self, members: Sequence[int], image: int) -> list[torch.Tensor]:
        """By band, (N, D, C, h, w)."""
        return list(torch.stack([self.stores[place].errors(image) for place in members], dim=1))
