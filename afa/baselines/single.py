"""One expert alone: as its own pipeline, in the ensemble's frame, or drawn for every image."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from afa.baselines.combination import Combination, Predict
from afa.baselines.options import RandomExpert, Single, SingleInEnsemble
from afa.baselines.sampler import PipelineSampler, find_expert, in_frame, settled
from afa.denoiser.base import EnsembleDenoiser
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.load import TEXT_ENCODERS, Expert
from afa.families.table import FAMILIES
from afa.generation.sample import OnStep, Request, Sampling
from afa.options import shares

DRAW = 20_824  # keeps the draw of an expert apart from other uses of the same seed


def single(ensemble: Ensemble, options: Single) -> PipelineSampler:
    """Expert k as the stock pipeline it came as."""
    return own_pipeline(ensemble.experts[find_expert(ensemble, options.expert)])


def own_pipeline(expert: Expert) -> PipelineSampler:
    """An expert's own modules in a stock pipeline; nothing of ours takes part. Raises UserError if it lacks a VAE or text encoders."""
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


def single_in_ensemble(ensemble: Ensemble, options: SingleInEnsemble) -> PipelineSampler:
    """Expert k with the ensemble's VAE, tokenizers and scheduler, and its own text encoders."""
    return _framed(ensemble, find_expert(ensemble, options.expert))


def _framed(ensemble: Ensemble, expert: int) -> PipelineSampler:
    return PipelineSampler(in_frame(ensemble, Alone(ensemble.denoiser, expert)))


class Drawn:
    """Every image by the expert that its seed draws, whatever the batch and the order of the experts.

    makers: expert's name -> its sampler, made when it is drawn first. chances: by name, with sum 1.
    """

    def __init__(self, makers: dict[str, Callable[[], PipelineSampler]], chances: dict[str, float]) -> None:
        self.makers, self.chances = makers, chances
        self.made: dict[str, PipelineSampler] = {}

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.makers)

    def draw(self, seed: int) -> str:
        """The expert of one image."""
        generator = np.random.default_rng([DRAW, seed])
        return self.names[generator.choice(len(self.names), p=[self.chances[name] for name in self.names])]

    def __call__(self, requests: Sequence[Request], sampling: Sampling, on_step: OnStep | None = None) -> NDArray[np.uint8]:
        """-> (n, H, W, 3) uint8. on_step: counts anew for every expert that was drawn.

        Raises UserError if the experts' own sizes differ and none was asked for.
        """
        drawn = [self.draw(request.seed) for request in requests]
        images: dict[int, NDArray[np.uint8]] = {}
        for name in sorted(set(drawn)):
            own = [index for index, other in enumerate(drawn) if other == name]
            if name not in self.made:
                self.made[name] = self.makers[name]()
            images |= dict(zip(own, self.made[name]([requests[index] for index in own], sampling, on_step), strict=True))
        if len({image.shape for image in images.values()}) > 1:
            raise UserError("the experts draw images of different sizes; give --width and --height")
        return np.stack([images[index] for index in range(len(requests))])


def random_expert(ensemble: Ensemble, options: RandomExpert) -> Drawn:
    """One expert an image: what a combination must beat before anything is said about combining."""
    chances = dict(zip(ensemble.names, shares(options.weights, len(ensemble.names)), strict=True))
    makers: dict[str, Callable[[], PipelineSampler]] = {
        expert.name: partial(own_pipeline, expert) if options.frame == "own" else partial(_framed, ensemble, index)
        for index, expert in enumerate(ensemble.experts)
    }
    return Drawn(makers, chances)
