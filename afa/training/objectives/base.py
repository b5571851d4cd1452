"""What every objective is: a loss of each sample, from one pass of the denoiser that several may share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from afa.denoiser.switches import watch_weights
from afa.training.noise import Batch, Noising


@dataclass
class Pass:
    """One batch on its way through the objectives; what several of them need is computed once, when it is first asked for.

    call: the denoiser as it is called (accelerate's wrapper around it); denoiser: itself. encode: dropped captions (B,) bool ->
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
    weights: dict[str, Tensor] = field(default_factory=dict)  # (B, N, H, W) by stage, with gradients; filled by prediction

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
        answer: Tensor = convention.prediction(call(**arguments, return_dict=False)[0], (noisy.shape[-2], noisy.shape[-1]))
        return answer.float()


class Objective(ABC):
    """A term of what is minimised. spare: tensors of noise a sample that it needs besides the batch's own."""

    spare: int = 0
    needs_weights: bool = False

    @abstractmethod
    def loss(self, work: Pass) -> Tensor:
        """Of each sample, (B,) float32, of about one at first; smaller is better."""


@dataclass(frozen=True)
class Term:
    """An objective and what it counts."""

    name: str
    weight: float
    objective: Objective


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
