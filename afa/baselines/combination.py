"""The drop-in denoiser whose prediction is made of the experts' whole predictions."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser, WeightMaps, only_expert

Predict = Callable[[int], Tensor]  # runs the expert of that index on the inputs of this pass


class Combination(ModelMixin, ConfigMixin, ABC):
    """Runs experts of an ensemble, each with its own part of the text, and combines what they predict.

    denoiser: the ensemble's, whose experts are run one at a time; its aggregators are not. A method says in `combine`
    which experts it needs at a step and what becomes of their predictions. Weights can be recorded as an ensemble's.
    """

    def __init__(self, denoiser: EnsembleDenoiser) -> None:
        super().__init__()
        self.register_to_config(**denoiser.config)
        self.ensemble = denoiser
        self._maps: WeightMaps | None = None  # see record_weights

    @abstractmethod
    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        """One pass: sample (B, C, H, W), B doubled by guidance -> prediction (B, C, H, W), weights of the experts.

        weights: (N,) the same everywhere, (B, N, H, W), or None where there are none to look at.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return self.ensemble.names

    @property
    def add_embedding(self) -> Any:
        """The first expert's; the SDXL pipeline reads its width."""
        return self.ensemble.add_embedding

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **conditions: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The stock forward; conditions: what else it takes (see UNetEnsemble.forward)."""

        def predict(expert: int) -> Tensor:
            with only_expert(self.ensemble, self.names[expert]):
                return self.ensemble(sample, timestep, encoder_hidden_states, return_dict=False, **conditions)[0]

        prediction, weights = self.combine(predict, sample, _one(timestep))
        if self._maps is not None and weights is not None:
            self._maps.begin(timestep)
            self._maps.observe(self.ensemble.stages[-1].name, _everywhere(weights, sample))
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def one_hot(self, expert: int) -> Tensor:
        """The weights of one expert alone, (N,)."""
        return torch.nn.functional.one_hot(torch.tensor(expert), len(self.names)).float()


def _one(timestep: Tensor | float | int) -> float:
    """The timestep of a pass as a number. Raises NotImplementedError for images at different ones."""
    values = torch.as_tensor(timestep).flatten()
    if len(values) > 1 and bool((values != values[0]).any()):
        raise NotImplementedError("images at different timesteps in one pass are not supported here; run them one by one")
    return float(values[0])


def _everywhere(weights: Tensor, sample: Tensor) -> Tensor:
    if weights.ndim > 1:
        return weights
    return weights.view(1, -1, 1, 1).expand(sample.shape[0], -1, *sample.shape[-2:])
