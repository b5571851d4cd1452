"""Held-out loss with fixed noise, and the weight that each expert gets."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from afa.denoiser.hooks import only_expert, record_weights
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.noise import Batch
from afa.training.objective_registry import OBJECTIVES
from afa.training.objective_terms import Objectives
from afa.training.objectives import Mse, Pass, evaluating

BANDS = 4  # equal parts of the timesteps, the first with the least noise
GROUPS = ("IN", "M", "OUT")  # how the names of stages begin; whatever begins otherwise is a group by itself
DROPPED = 0.02  # a mean weight below this, everywhere, is an expert that is not used


def bands_of(timesteps: Tensor, train_timesteps: int) -> NDArray[np.int64]:
    """Return the noise band of each timestep: (B,) to (B,)."""
    found: NDArray[np.int64] = (timesteps.cpu().numpy().astype(np.int64) * BANDS // train_timesteps).clip(
        0, BANDS - 1
    )
    return found


def group_of(stage: str) -> str:
    """Return the group of a stage's name: IN05 belongs to IN."""
    return next((group for group in GROUPS if stage.startswith(group)), stage)


@dataclass(frozen=True)
class Routing:
    """Mean weights of the experts.

    weights: (groups, bands, N) means over stages, images and pixels; they sum to 1 over N
    entropy: (groups, bands) of the weights of a pixel, from 0 (one expert alone) to 1 (all equal)
    experts: N names
    groups:  names of groups of stages
    """

    experts: tuple[str, ...]
    groups: tuple[str, ...]
    weights: NDArray[np.float64]
    entropy: NDArray[np.float64]

    @property
    def shares(self) -> dict[str, float]:
        """Return each expert's mean weight over all groups and bands."""
        return dict(zip(self.experts, self.weights.mean((0, 1)).tolist(), strict=True))

    @property
    def dropped(self) -> list[str]:
        """Return the experts that get hardly any weight in all groups and bands."""
        return [
            name for name, most in zip(self.experts, self.weights.max((0, 1)), strict=True) if most < DROPPED
        ]

    def facts(self) -> dict[str, Any]:
        """Return rounded values for the log."""
        return {
            "bands": BANDS,
            "weights": {
                group: {
                    name: np.round(self.weights[place, :, index], 4).tolist()
                    for index, name in enumerate(self.experts)
                }
                for place, group in enumerate(self.groups)
            },
            "entropy": {
                group: np.round(self.entropy[place], 4).tolist() for place, group in enumerate(self.groups)
            },
        }


class RoutingSums:
    """Adds up weight maps, pass by pass, without keeping them.

    experts: names
    stages:  names of the fused stages
    """

    def __init__(self, experts: Sequence[str], stages: Sequence[str]) -> None:
        self.experts = tuple(experts)
        self.groups = tuple(dict.fromkeys(group_of(stage) for stage in stages))
        self._weights = np.zeros((len(self.groups), BANDS, len(self.experts)))
        self._entropy = np.zeros((len(self.groups), BANDS))
        self._count = np.zeros((len(self.groups), BANDS))

    def add(self, maps: Mapping[str, Tensor], bands: NDArray[np.int64]) -> None:
        """Add the weight maps of one pass.

        maps:  (B, N, H, W) by stage
        bands: (B,) of each sample
        """
        for stage, weights in maps.items():
            group = self.groups.index(group_of(stage))
            means = weights.double().mean((2, 3)).numpy()
            alike = torch.special.entr(weights.double()).sum(1).mean((1, 2)).numpy() / np.log(
                max(2, len(self.experts))
            )
            np.add.at(self._weights[group], bands, means)
            np.add.at(self._entropy[group], bands, alike)
            np.add.at(self._count[group], bands, 1)

    def result(self) -> Routing:
        """Return the means; a band without samples gets the mean of its group's other bands."""
        count = np.maximum(self._count, 1)
        weights, entropy = self._weights / count[..., None], self._entropy / count
        for group, band in zip(*np.nonzero(self._count == 0), strict=True):
            seen = self._count[group] > 0
            if seen.any():
                weights[group, band], entropy[group, band] = (
                    weights[group, seen].mean(0),
                    entropy[group, seen].mean(),
                )
        return Routing(self.experts, self.groups, weights, entropy)


SEED = 777  # of the held-out noise: the same for every run, so that runs can be compared
PARTS = 4  # a weight map is kept as the means of 4 × 4 parts, so that maps of different steps can be compared


def in_parts(maps: Mapping[str, Tensor], sizes_differ: bool = False) -> Tensor:
    """Return the weight maps of one pass, averaged over 4 × 4 parts of the image: (B, K) float16.

    maps: (B, N, H, W) by stage
    sizes_differ: whether other passes have maps of other sizes; smaller maps then have 4 × 4 parts as well
    """

    def sides(weights: Tensor) -> tuple[int, int]:
        height, width = (PARTS if sizes_differ else min(PARTS, side) for side in weights.shape[2:])
        return height, width

    parts = [adaptive_avg_pool2d(weights, sides(weights)).flatten(1) for weights in maps.values()]
    return torch.cat(parts, dim=1).half()


@dataclass(frozen=True)
class Measured:
    """One measurement on the held-out images.

    losses:    (n,) diffusion loss of each image
    bands:     (n,) noise band of each image
    routing:   weights of the experts; None if nothing is fused
    terms:     mean of each term of the objective
    objective: weighted sum of the terms; the best weights minimise it
    maps:      (n, K) weights of the experts at all stages, see in_parts; None if nothing is fused
    """

    losses: NDArray[np.float64]
    bands: NDArray[np.int64]
    routing: Routing | None
    terms: dict[str, float]
    objective: float
    maps: Tensor | None = None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def by_band(self) -> list[float | None]:
        """Return the mean loss of each band, from little noise to much; None for a band without images."""
        of_bands = [self.losses[self.bands == band] for band in range(BANDS)]
        return [float(losses.mean()) if len(losses) else None for losses in of_bands]


@dataclass(frozen=True)
class Before:
    """What the held-out images say before the first step; it is measured once, and saved with the state.

    losses:  (n,) of the model that is trained, as it is then
    maps:    (n, K) weights of its experts, see in_parts; None if nothing is fused
    experts: (n,) losses of each expert alone, by name; empty for one expert
    """

    losses: NDArray[np.float64]
    maps: Tensor | None
    experts: dict[str, NDArray[np.float64]]

    def as_state(self) -> dict[str, Any]:
        """Return it as what torch.save keeps without code."""
        experts = {name: losses.tolist() for name, losses in self.experts.items()}
        return {"losses": self.losses.tolist(), "maps": self.maps, "experts": experts}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], images: int) -> "Before":
        """Return what as_state() made. Raises ValueError if it is not of that many images."""
        experts = {name: np.asarray(losses, np.float64) for name, losses in state["experts"].items()}
        own, maps = np.asarray(state["losses"], np.float64), state["maps"]
        if any(losses.shape != (images,) for losses in (own, *experts.values())):
            raise ValueError(f"it was not measured on {images} held-out images")
        return cls(own, None if maps is None else maps.cpu(), experts)

    def moved(self, after: Measured) -> float | None:
        """Return the mean absolute change of the experts' weights since; None if nothing is fused."""
        if self.maps is None or after.maps is None:
            return None
        return float((after.maps.float() - self.maps.float()).abs().mean())


class HeldOut:
    """Measures a denoiser on fixed images with fixed noise and evenly spread timesteps, size by size.

    teacher: gives the targets of the diffusion loss; None: the images do
    batch:   latents, noise and timesteps of all data; None: the images', with drawn noise
    """

    def __init__(
        self,
        data: Encoded,
        objectives: Objectives,
        conditions: Conditions,
        batch_size: int,
        seed: int = SEED,
        teacher: Any = None,
        batch: Batch | None = None,
    ) -> None:
        self.data, self.conditions, self.teacher = data, conditions, teacher
        self.noising, self.total = objectives.noising, objectives.held_out
        whole = (
            self.noising.spread(data, seed, self.total.extra_noise)
            if batch is None
            else [(list(range(len(data))), batch)]
        )
        self.sizes_differ = len(whole) > 1
        self.parts = [
            (rows[start : start + batch_size], of_size.part(start, min(start + batch_size, len(rows))))
            for rows, of_size in whole
            for start in range(0, len(rows), batch_size)
        ]
        self.order = torch.tensor([row for rows, _ in self.parts for row in rows]).argsort()
        steps = torch.cat([part.steps for _, part in self.parts]).cpu()
        self._bands = bands_of(steps, self.noising.steps)  # in the order of the parts
        self.bands = self._bands[self.order.numpy()]
        self._mse = Mse(self.noising)
        plain = [term.name in OBJECTIVES and OBJECTIVES[term.name].diffusion for term in self.total.terms]
        self._other_terms = plain != [True]  # the diffusion loss is measured in any case

    def measure(self, denoiser: Any, whole: bool = False) -> Measured:
        """Measure the denoiser as it is now.

        whole: also measure the other terms of the objective, and the weights if several experts are fused
        """
        losses: list[Tensor] = []
        parts: list[Tensor] = []
        others: list[dict[str, Tensor]] = []
        sums = RoutingSums(denoiser.names, denoiser.fused) if whole and len(denoiser.names) > 1 else None
        done = 0
        for rows, batch in self.parts:
            teacher = self.teacher
            work = Pass.of(denoiser, self.noising, self.conditions, self.data, rows, batch, teacher=teacher)
            work.watched = self.total.needs_weights
            with torch.no_grad(), evaluating(denoiser):
                with nullcontext() if sums is None else record_weights(denoiser) as maps:
                    losses.append(self._mse.loss(work))
                if whole and self._other_terms:
                    others.append(self.total.losses(work))
            if sums is not None and maps is not None:
                sums.add(maps.maps[0], self._bands[done : done + len(rows)])
                parts.append(in_parts(maps.maps[0], self.sizes_differ))
            done += len(rows)
        terms = {
            name: torch.cat([part[name] for part in others]).double().cpu()[self.order]
            for name in (others[0] if others else ())
        }
        found = torch.cat(losses).double().cpu()[self.order].numpy()
        means = {name: float(values.mean()) for name, values in terms.items()}
        whole_loss = float(self.total.sum(terms).mean()) if terms else float(found.mean())
        routing = None if sums is None else sums.result()
        weights = torch.cat(parts)[self.order.to(parts[0].device)] if parts else None
        return Measured(found, self.bands, routing, means, whole_loss, weights)

    def experts(self, denoiser: Any) -> dict[str, NDArray[np.float64]]:
        """Return the losses (n,) of each expert alone, by name; of one expert nothing."""
        found = {}
        for name in denoiser.names if len(denoiser.names) > 1 else ():
            with only_expert(denoiser, name):
                found[name] = self.measure(denoiser).losses
        return found

    def broken(self, denoiser: Any) -> list[str]:
        """Return the experts whose own predictions on the held-out images are not finite."""
        found = []
        for name in denoiser.names:
            with only_expert(denoiser, name):
                if not np.isfinite(self.measure(denoiser).losses).all():
                    found.append(name)
        return found
