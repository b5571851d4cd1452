"""The fixed measure: the loss on images that are never trained on, with their noise fixed, and where the weights go meanwhile."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.switches import only_expert, record_weights
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.noise import Batch, Noising
from afa.training.objectives.base import Pass, Total
from afa.training.objectives.mse import Mse
from afa.training.routing import BANDS, Routing, RoutingSums, bands_of

SEED = 777  # of the held-out noise: the same for every run, so that runs can be compared


@dataclass(frozen=True)
class Measured:
    """losses (n,): the diffusion loss of each held-out image. bands (n,): of its timestep. routing: None where nothing is weighed.

    terms: the mean of each term of the objective; objective: their weighted sum, what the best weights have least of.
    """

    losses: NDArray[np.float64]
    bands: NDArray[np.int64]
    routing: Routing | None
    terms: dict[str, float]
    objective: float

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def by_band(self) -> list[float | None]:
        """The mean loss of each band, from little noise to much; None where no image fell."""
        of_bands = [self.losses[self.bands == band] for band in range(BANDS)]
        return [float(losses.mean()) if len(losses) else None for losses in of_bands]


class HeldOut:
    """Measures a denoiser, batch by batch; always the same images, noise and timesteps, spread evenly."""

    def __init__(self, data: Encoded, noising: Noising, conditions: Conditions, batch_size: int, total: Total) -> None:
        self.data, self.noising, self.conditions, self.batch_size, self.total = data, noising, conditions, batch_size, total
        self.batch = noising.spread(data, SEED, total.spare)
        self.bands = bands_of(self.batch.steps, noising.steps)
        self._mse = Mse(noising)
        self._only_mse = [term.name for term in total.terms] == ["mse"]

    def measure(self, denoiser: Any, whole: bool = False) -> Measured:
        """The denoiser as it is now. whole: also every other term of the objective, and the weights, where several experts are fused."""
        losses: list[Tensor] = []
        others: list[dict[str, Tensor]] = []
        sums = RoutingSums(denoiser.names, denoiser.fused) if whole and len(denoiser.names) > 1 else None
        for start in range(0, len(self.data), self.batch_size):
            stop = min(start + self.batch_size, len(self.data))
            work = self._pass(denoiser, start, stop)
            with torch.no_grad():
                with nullcontext() if sums is None else record_weights(denoiser) as maps:
                    losses.append(self._mse.loss(work))
                if whole and not self._only_mse:
                    others.append(self.total.losses(work))
            if sums is not None and maps is not None:
                sums.add(maps.maps[0], self.bands[start:stop])
        terms = {name: torch.cat([part[name] for part in others]).double().cpu() for name in (others[0] if others else ())}
        found = torch.cat(losses).double().cpu().numpy()
        means = {name: float(values.mean()) for name, values in terms.items()}
        whole_loss = float(self.total.sum(terms).mean()) if terms else float(found.mean())
        return Measured(found, self.bands, None if sums is None else sums.result(), means, whole_loss)

    def _pass(self, denoiser: Any, start: int, stop: int) -> Pass:
        """Some of the images, none without its caption."""
        captions, sizes = self.data.captions[start:stop], self.data.sizes[start:stop]
        batch: Batch = self.batch.part(start, stop)
        none = torch.zeros(stop - start, dtype=torch.bool, device=batch.latents.device)
        watched = self.total.needs_weights
        return Pass(denoiser, denoiser, self.noising, batch, captions, none, functools.partial(self.conditions, captions, sizes), watched)

    def broken(self, denoiser: Any) -> list[str]:
        """The experts whose own predictions on the held-out images are not all finite numbers."""
        found = []
        for name in denoiser.names:
            with only_expert(denoiser, name):
                if not np.isfinite(self.measure(denoiser).losses).all():
                    found.append(name)
        return found
