"""From what experts answered to what a set of them can do: head-room by band, agreement, subsets; all with intervals over images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from afa.evaluation.statistics import Estimate, estimate, gain
from afa.screening.headroom import Routes, chance_agreement, routed, routes
from afa.screening.store import Store

Array = NDArray[np.float64]
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
        return np.stack([[self._losses(store, image) for image in range(self.images)] for store in self.stores])

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
        return [[routes(errors) for errors in self._errors(self.ranking, image)] for image in range(self.images)]

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
        return [(estimate(observed[:, band]), chance_agreement(wins[:, :, band].T)) for band in range(self.bands)]

    def routed(self, members: Sequence[int]) -> Array:
        """The routed loss (M, BANDS) of some of the experts, pixels: one winner for all channels of a place. One expert: its own."""
        ordered = tuple(sorted(members, key=self.ranking.index))
        if len(ordered) == 1:
            return self.losses[ordered[0]]
        if ordered not in self._routed:
            rows = [[self._routed_pixels(errors) for errors in self._errors(ordered, image)] for image in range(self.images)]
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
        return min(combinations(range(len(self.names)), size), key=lambda members: float(self.routed(members).mean()))

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
        return (self.stores[one].errors(image) - self.stores[other].errors(image)).square().mean((1, 2, 3, 4)).numpy()

    def _losses(self, store: Store, image: int) -> Any:
        return store.errors(image).square().double().mean((1, 2, 3, 4)).numpy()

    def _errors(self, members: Sequence[int], image: int) -> list[torch.Tensor]:
        """By band, (N, D, C, h, w)."""
        return list(torch.stack([self.stores[place].errors(image) for place in members], dim=1))
