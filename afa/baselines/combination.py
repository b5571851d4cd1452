"""The drop-in denoiser whose prediction is made of the experts' whole predictions."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.switches import WeightMaps, only_expert

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
        """One pass: sample (B, C, H, W), B doubled where guidance does so -> prediction (B, C, H, W), weights of the experts.

        timestep: as schedulers count it. weights: (N,) the same everywhere, (B, N, H, W), or None where there are none to look at.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return self.ensemble.names

    @property
    def family(self) -> str:
        """The experts'."""
        return self.ensemble.family

    @property
    def add_embedding(self) -> Any:
        """The first expert's; the SDXL pipeline reads its width."""
        return self.ensemble.add_embedding

    @property
    def encoder_hid_proj(self) -> Any:
        """FLUX pipelines ask whether there is an IP-Adapter."""
        return self.ensemble.encoder_hid_proj

    def cache_context(self, name: str, **where: Any) -> AbstractContextManager[None]:
        """Asked for by the pipelines of some transformers."""
        return self.ensemble.cache_context(name, **where)

    @cached_property
    def _stock(self) -> inspect.Signature:
        return inspect.signature(self.ensemble.forward)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The stock forward of the experts' family."""
        given, call = self._stock.bind(*args, **kwargs).arguments, self.ensemble.call
        sample = call.latents(given)
        timestep = _one(self.ensemble.times(given["timestep"], sample))
        size = (sample.shape[-2], sample.shape[-1])

        def predict(expert: int) -> Tensor:
            with only_expert(self.ensemble, self.names[expert]):
                return call.prediction(self.ensemble(**given, return_dict=False)[0], size)

        prediction, weights = self.combine(predict, sample, timestep)
        if self._maps is not None and weights is not None and not self.ensemble.aside:
            self._maps.begin(timestep)
            self._maps.observe(self.ensemble.stages[-1].name, _everywhere(weights, sample))
        answer = call.answer(prediction)
        return self.ensemble.output(sample=answer) if return_dict else (answer,)

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
