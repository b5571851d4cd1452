"""Combining whole predictions while sampling: the shared drop-in denoiser, and single experts."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import WeightMaps, only_expert
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.expert import TEXT_ENCODERS, Expert
from afa.models.registry import FAMILIES
from afa.sampling.options import OneExpert, RandomExpert
from afa.sampling.sample import OnStep, PipelineSampler, Request, Sampling, find_expert, in_frame, settled
from afa.settings import shares
from afa.stages.interface import ModelInterface

Predict = Callable[[int], Tensor]  # runs the expert of that index on the inputs of this pass


class Combination(ModelMixin, ConfigMixin, ABC):
    """A drop-in denoiser that runs experts one at a time and combines their predictions.

    denoiser: the ensemble's; its aggregators are not used
    A method defines `combine`: which experts it runs at a step, and what it makes of their predictions.
    Weights can be recorded as those of an ensemble.
    """

    def __init__(self, denoiser: EnsembleDenoiser) -> None:
        super().__init__()
        self.register_to_config(**denoiser.config)
        self.ensemble = denoiser
        self._maps: WeightMaps | None = None  # see record_weights

    @abstractmethod
    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        """Return the prediction of one pass, (B, C, H, W), and the weights of the experts.

        predict:  index of an expert -> its prediction (B, C, H, W)
        sample:   (B, C, H, W); guidance may double B
        timestep: as schedulers count it
        The weights are (N,) if they are equal everywhere, or (B, N, H, W), or None if there are none.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts that are weighed, in order."""
        return self.ensemble.names

    @property
    def family(self) -> str:
        """The family of the experts."""
        return self.ensemble.family

    @property
    def interface(self) -> ModelInterface:
        """How the denoiser is called."""
        return self.ensemble.interface

    @property
    def in_channels(self) -> int:
        """The number of channels of the latents; a pipeline may read it here."""
        return int(self.config.in_channels)

    @property
    def add_embedding(self) -> Any:
        """The first expert's; a pipeline may read its width."""
        return self.ensemble.add_embedding

    @property
    def encoder_hid_proj(self) -> Any:
        """A pipeline may read here whether there is an IP-Adapter."""
        return self.ensemble.encoder_hid_proj

    @property
    def transformer_blocks(self) -> Any:
        """The experts'; the pipeline of Qwen-Image 2.1 makes a cache for each of them."""
        return self.ensemble.transformer_blocks

    def cache_context(self, name: str, **where: Any) -> AbstractContextManager[None]:
        """Return the context that the pipelines of some transformers open."""
        return self.ensemble.cache_context(name, **where)

    @cached_property
    def _stock(self) -> inspect.Signature:
        return inspect.signature(self.ensemble.forward)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run the stock forward of the experts' family."""
        given, interface = self._stock.bind(*args, **kwargs).arguments, self.ensemble.interface
        self.ensemble.note_pass(given)
        sample = interface.latents(given)
        timestep = _one(self.ensemble.times(given[interface.timestep_input], sample))
        size = (sample.shape[-2], sample.shape[-1])

        def predict(expert: int) -> Tensor:
            with only_expert(self.ensemble, self.ensemble.names[expert]):
                return interface.to_latents(self.ensemble(**given, return_dict=False)[0], size)

        prediction, weights = self.combine(predict, sample, timestep)
        if self._maps is not None and weights is not None and not self.ensemble.in_uncond_pass:
            self._maps.begin(timestep)
            if weights.ndim == 1:
                weights = weights.view(1, -1, 1, 1).expand(sample.shape[0], -1, *size)
            self._maps.observe(self.ensemble.stages[-1].name, weights)
        answer = interface.from_latents(prediction)
        return self.ensemble.output(sample=answer) if return_dict else (answer,)

    def one_hot(self, expert: int) -> Tensor:
        """Return the weights of one expert alone, (N,)."""
        return torch.nn.functional.one_hot(torch.tensor(expert), len(self.names)).float()


def _one(timestep: Tensor | float | int) -> float:
    """Return the timestep of a pass. Raises NotImplementedError if images are at different timesteps."""
    values = torch.as_tensor(timestep).flatten()
    if len(values) > 1 and bool((values != values[0]).any()):
        raise NotImplementedError(
            "images at different timesteps in one pass are not supported here; run them one by one"
        )
    return float(values[0])


DRAW = 20_824  # keeps the draw of an expert apart from other uses of the same seed


def single(ensemble: Ensemble, options: OneExpert) -> PipelineSampler:
    """Return a sampler of one expert with its own components, as its stock pipeline."""
    return own_pipeline(ensemble.experts[find_expert(ensemble, options.expert)])


def own_pipeline(expert: Expert) -> PipelineSampler:
    """Return a sampler of an expert's own modules in a stock pipeline, without any module of afa.

    Raises UserError if it lacks a VAE or text encoders.
    """
    alone = Ensemble.from_experts([expert], aggregator="mean", placement="out")
    parts: dict[str, Any] = dict(zip(TEXT_ENCODERS, expert.text_encoders, strict=False))
    parts[FAMILIES[expert.family].component] = expert.model
    return PipelineSampler(settled(alone.pipeline(**parts), expert))


class Alone(Combination):
    """One expert, in the ensemble's frame."""

    def __init__(self, denoiser: EnsembleDenoiser, expert: int) -> None:
        super().__init__(denoiser)
        self.expert = expert

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        return predict(self.expert), None


def single_in_ensemble(ensemble: Ensemble, options: OneExpert) -> PipelineSampler:
    """Return a sampler of one expert with its own text encoders, in the ensemble's frame."""
    return _framed(ensemble, find_expert(ensemble, options.expert))


def _framed(ensemble: Ensemble, expert: int) -> PipelineSampler:
    return PipelineSampler(in_frame(ensemble, Alone(ensemble.denoiser, expert)))


class OneEach(ABC):
    """Draws every image with one expert.

    makers: expert's name -> a function that makes its sampler
    """

    def __init__(self, makers: dict[str, Callable[[], PipelineSampler]]) -> None:
        self.makers = makers
        self.made: dict[str, PipelineSampler] = {}

    @abstractmethod
    def choose(self, requests: Sequence[Request]) -> list[str]:
        """Return the name of every image's expert."""

    def __call__(
        self, requests: Sequence[Request], sampling: Sampling, on_step: OnStep | None = None
    ) -> NDArray[np.uint8]:
        """Draw one batch of images: (n, H, W, 3) uint8.

        on_step: its count begins again for every expert
        Raises UserError if the experts' own sizes differ and the request has none.
        """
        drawn = self.choose(requests)
        images: dict[int, NDArray[np.uint8]] = {}
        for name in sorted(set(drawn)):
            own = [index for index, other in enumerate(drawn) if other == name]
            if name not in self.made:
                self.made[name] = self.makers[name]()
            images |= dict(
                zip(own, self.made[name]([requests[index] for index in own], sampling, on_step), strict=True)
            )
        if len({image.shape for image in images.values()}) > 1:
            raise UserError("the experts draw images of different sizes; give --width and --height")
        return np.stack([images[index] for index in range(len(requests))])


class Drawn(OneEach):
    """Draws every image with one expert, which depends on the image's seed only.

    chances: expert's name -> its probability; the sum is 1
    """

    def __init__(self, makers: dict[str, Callable[[], PipelineSampler]], chances: dict[str, float]) -> None:
        super().__init__(makers)
        self.chances = chances

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.makers)

    def draw(self, seed: int) -> str:
        """Return the name of the expert of one image."""
        generator = np.random.default_rng([DRAW, seed])
        return self.names[generator.choice(len(self.names), p=[self.chances[name] for name in self.names])]

    def choose(self, requests: Sequence[Request]) -> list[str]:
        return [self.draw(request.seed) for request in requests]


def random_expert(ensemble: Ensemble, options: RandomExpert) -> Drawn:
    """Return a sampler that draws one expert for each image: the baseline of every combination."""
    chances = dict(zip(ensemble.names, shares(options.weights, len(ensemble.names)), strict=True))
    makers: dict[str, Callable[[], PipelineSampler]] = {
        expert.name: partial(own_pipeline, expert)
        if options.frame == "own"
        else partial(_framed, ensemble, index)
        for index, expert in enumerate(ensemble.experts)
    }
    return Drawn(makers, chances)
