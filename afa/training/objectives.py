"""Objectives: what the terms of a training loss share, squared error, anchor, sparsity."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from afa.denoiser.hooks import watch_weights
from afa.errors import UserError
from afa.training.noise import Batch, Noising


@dataclass
class Pass:
    """One batch on its way through the objectives.

    What several of them need is computed once, when it is first asked for.

    call: the denoiser as it is called (accelerate's wrapper around it); denoiser: itself. encode: dropped
          captions (B,) bool ->
    the denoiser's conditions. watched: whether the weights of the fused stages are wanted.
    """

    call: Any
    denoiser: Any
    noising: Noising
    batch: Batch
    captions: Sequence[str]
    dropped: Tensor
    encode: Callable[[Tensor], dict[str, Any]]
    watched: bool = False
    weights: dict[str, Tensor] = field(
        default_factory=dict
    )  # (B, N, H, W) by stage, with gradients; filled by prediction

    @cached_property
    def conditions(self) -> dict[str, Any]:
        return self.encode(self.dropped)

    @cached_property
    def noisy(self) -> Tensor:
        return self.noising.noisy(self.batch.latents, self.batch.noise, self.batch.steps)

    @cached_property
    def prediction(self) -> Tensor:
        """(B, C, h, w) float32."""
        with watch_weights(self.denoiser, self.weights.__setitem__) if self.watched else nullcontext():
            return self.predict(self.call, self.noisy, self.noising.told(self.batch.steps), self.conditions)

    @cached_property
    def clean(self) -> Tensor:
        """The clean latents that the prediction claims, (B, C, h, w)."""
        return self.noising.clean(self.noisy, self.prediction, self.batch.steps)

    def predict(self, call: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The denoiser's answer as latents (B, C, h, w) in float32, whatever it computes in."""
        dtype = next(self.denoiser.experts.parameters()).dtype
        convention = self.denoiser.call
        arguments = convention.arguments(self.denoiser.config, noisy.to(dtype), times, conditions)
        answer: Tensor = convention.prediction(
            call(**arguments, return_dict=False)[0], (noisy.shape[-2], noisy.shape[-1])
        )
        return answer.float()


class Objective(ABC):
    """A term of what is minimised. spare: tensors of noise a sample that it needs besides the batch's own."""

    spare: int = 0
    needs_weights: bool = False

    @abstractmethod
    def loss(self, work: Pass) -> Tensor:
        """Of each sample, (B,) float32, of about one at first; smaller is better."""

    def unweighted(self) -> "Objective":
        """The same where no sample's loss is weighed, for held-out images."""
        return self


@dataclass(frozen=True)
class Term:
    """An objective and what it counts."""

    name: str
    weight: float
    objective: Objective


@dataclass(frozen=True)
class Means:
    """What objectives are made of.

    settings: an ObjectiveSettings
    decoder:  latents -> images, where images are judged
    reward:   images, captions -> (B,), where images are judged
    """

    settings: Any
    noising: Noising
    decoder: Any = None
    reward: Any = None


class Total:
    """The weighted sum of several objectives."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.spare = max(term.objective.spare for term in self.terms)
        self.needs_weights = any(term.objective.needs_weights for term in self.terms)

    def losses(self, work: Pass) -> dict[str, Tensor]:
        """Of each sample, by term, before it is weighed: (B,)."""
        work.watched = self.needs_weights
        if self.needs_weights:
            _ = work.prediction  # fills the weights, whichever term comes first
        return {term.name: term.objective.loss(work) for term in self.terms}

    def sum(self, losses: dict[str, Tensor]) -> Tensor:
        """(B,)."""
        parts = [term.weight * losses[term.name] for term in self.terms]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class Mse(Objective):
    """The diffusion loss. snr_gamma: min-SNR-γ weighting. weighting: SD3's, of a flow.

    Neither: all steps count alike.

    Raises UserError for a weighting that is not the schedule's.
    """

    def __init__(
        self, noising: Noising, snr_gamma: float | None = None, weighting: str | None = None
    ) -> None:
        if weighting is not None and not noising.is_flow:
            raise UserError(
                f"--weighting {weighting} weighs a flow, and these experts predict '{noising.kind}'; try"
                " --snr-gamma 5"
            )
        self.noising, self.snr_gamma, self.weighting = noising, snr_gamma, weighting

    def loss(self, work: Pass) -> Tensor:
        error: Tensor = (work.prediction - self.noising.target(work.batch)).square().mean((1, 2, 3))
        return (
            error
            if self.snr_gamma is None and self.weighting is None
            else error * self.weights(work.batch.steps)
        )

    def unweighted(self) -> "Mse":
        return Mse(self.noising)

    def weights(self, steps: Tensor) -> Tensor:
        """What a sample's error counts, (B,)."""
        if self.weighting is not None:
            return self.noising.flow_weighting(steps, self.weighting)
        assert self.snr_gamma is not None
        return self.noising.min_snr(steps, self.snr_gamma)


def make_mse(means: Means) -> Mse:
    return Mse(means.noising, means.settings.snr_gamma, means.settings.weighting)


class Anchor(Objective):
    """Of the prediction to that with the first weights of what is trained.

    An untrained ensemble, or the one it starts from.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.first = [parameter.detach().clone() for parameter in self.parameters]

    def loss(self, work: Pass) -> Tensor:
        prediction = work.prediction
        with torch.no_grad(), self._back():
            before = work.predict(
                work.denoiser, work.noisy, work.noising.told(work.batch.steps), work.conditions
            )
        return (prediction - before).square().mean((1, 2, 3))

    @contextmanager
    def _back(self) -> Iterator[None]:
        """Inside, the parameters are what they were at first."""
        now = [parameter.data for parameter in self.parameters]
        for parameter, first in zip(self.parameters, self.first, strict=True):
            parameter.data = first
        try:
            yield
        finally:
            for parameter, current in zip(self.parameters, now, strict=True):
                parameter.data = current


class Sparsity(Objective):
    """The mean over stages and places of the weights' entropy, from 0 (one expert) to 1 (all alike).

    top: instead, the share of the weight outside the `top` largest, from 0 to 1 - top / N.
    """

    needs_weights = True

    def __init__(self, top: int | None = None) -> None:
        self.top = top

    def loss(self, work: Pass) -> Tensor:
        return torch.stack([self._spread(weights.float()) for weights in work.weights.values()]).mean(0)

    def _spread(self, weights: Tensor) -> Tensor:
        """(B, N, H, W) -> (B,)."""
        if self.top is not None:
            return 1 - weights.topk(min(self.top, weights.shape[1]), dim=1).values.sum(1).mean((1, 2))
        # entr(0) has an infinite slope, and a softmax can reach 0
        return torch.special.entr(weights.clamp(min=1e-12)).sum(1).mean((1, 2)) / math.log(
            max(2, weights.shape[1])
        )
