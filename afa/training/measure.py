"""The fixed measure: the loss on images that are never trained on, with their noise fixed, and where the weights go meanwhile."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from afa.denoiser.base import only_expert, record_weights
from afa.training.conditions import Conditions
from afa.training.data import Encoded
from afa.training.objective import Objective
from afa.training.routing import BANDS, Routing, RoutingSums, bands_of

SEED = 777  # of the held-out noise: the same for every run, so that runs can be compared


@dataclass(frozen=True)
class Measured:
    """losses (n,): of each held-out image. bands (n,): of its timestep. routing: None where nothing is weighed."""

    losses: NDArray[np.float64]
    bands: NDArray[np.int64]
    routing: Routing | None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def by_band(self) -> list[float | None]:
        """The mean loss of each band, from little noise to much; None where no image fell."""
        of_bands = [self.losses[self.bands == band] for band in range(BANDS)]
        return [float(losses.mean()) if len(losses) else None for losses in of_bands]


class HeldOut:
    """Measures a denoiser, batch by batch; always the same images, noise and timesteps, spread evenly."""

    def __init__(self, data: Encoded, objective: Objective, conditions: Conditions, batch_size: int) -> None:
        self.data, self.objective, self.conditions, self.batch_size = data, objective, conditions, batch_size
        self.batch = objective.spread(data, SEED)
        self.bands = bands_of(self.batch.timesteps, objective.noises.config.num_train_timesteps)

    def measure(self, denoiser: Any, routing: bool = False) -> Measured:
        """The denoiser as it is now. routing: also follow the weights, where several experts are fused."""
        size, losses = self.batch_size, []
        none = torch.zeros(size, dtype=torch.bool)
        sums = RoutingSums(denoiser.names, denoiser.fused) if routing and len(denoiser.names) > 1 else None
        dtype = next(denoiser.experts.parameters()).dtype
        for start in range(0, len(self.data), size):
            stop = min(start + size, len(self.data))
            text = self.conditions(self.data.captions[start:stop], self.data.sizes[start:stop], none[: stop - start])
            with torch.no_grad(), nullcontext() if sums is None else record_weights(denoiser) as maps:
                losses.append(self.objective.loss(denoiser, self.batch.part(start, stop), text, dtype))
            if sums is not None and maps is not None:
                sums.add(maps.maps[0], self.bands[start:stop])
        found = torch.cat(losses).double().cpu().numpy()
        return Measured(found, self.bands, None if sums is None else sums.result())

    def broken(self, denoiser: Any) -> list[str]:
        """The experts whose own predictions on the held-out images are not all finite numbers."""
        found = []
        for name in denoiser.names:
            with only_expert(denoiser, name):
                if not np.isfinite(self.measure(denoiser).losses).all():
                    found.append(name)
        return found
