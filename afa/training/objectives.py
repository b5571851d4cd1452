"""Objectives: what the terms of a training loss share, squared error, anchor, sparsity."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from afa.denoiser.hooks import only_expert, watch_weights
from afa.errors import UserError
from afa.training.noise import Batch, Noising


@dataclass
class Pass:
    """One batch that all terms of a loss are computed on. What several terms need is computed once.

    call:     the denoiser as it is called: accelerate's wrapper, or the denoiser itself
    denoiser: the denoiser itself
    noising:  the forward process
    batch:    clean latents, noise and timesteps of B samples
    captions: B captions
    dropped:  (B,) bool, True where a sample is trained without its caption
    encode:   such a mask -> the denoiser's keyword arguments for the captions
    sizes:    (B, 6) SDXL's size conditions; a teacher reads them
    teacher:  gives the target of the prediction; None: the data do
    asked:    how many samples, the first ones, the teacher answers; None: all
    watched:  whether the weights of the fused stages are recorded
    weights:  (B, N, H, W) by stage, with gradients; filled when the prediction is made
    """

    call: Any
    denoiser: Any
    noising: Noising
    batch: Batch
    captions: Sequence[str]
    dropped: Tensor
    encode: Callable[[Tensor], dict[str, Any]]
    sizes: Tensor | None = None
    teacher: Callable[["Pass"], Tensor] | None = None
    asked: int | None = None
    watched: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        denoiser: Any,
        noising: Noising,
        conditions: Any,
        data: Any,
        rows: list[int],
        batch: Batch,
        dropped: Tensor | None = None,
        call: Any = None,
        teacher: Callable[["Pass"], Tensor] | None = None,
    ) -> "Pass":
        """Return the pass of some rows of the data.

        conditions: a Conditions, which encodes captions
        data:       an Encoded
        dropped:    see Pass; None: all samples keep their captions
        call:       see Pass; None: the denoiser itself
        teacher:    see Pass
        """
        captions, sizes = [data.captions[row] for row in rows], data.sizes[rows]
        if dropped is None:
            dropped = torch.zeros(len(rows), dtype=torch.bool, device=batch.latents.device)
        encode = partial(conditions, captions, sizes)
        return cls(call or denoiser, denoiser, noising, batch, captions, dropped, encode, sizes, teacher)

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The denoiser's keyword arguments for the captions."""
        return self.encode(self.dropped)

    @cached_property
    def noisy(self) -> Tensor:
        """The noisy latents, (B, C, h, w)."""
        return self.noising.noisy(self.batch.latents, self.batch.noise, self.batch.steps)

    @cached_property
    def prediction(self) -> Tensor:
        """What the denoiser predicts from the noisy latents, (B, C, h, w) float32."""
        with watch_weights(self.denoiser, self.weights.__setitem__) if self.watched else nullcontext():
            return self.predict(self.call, self.noisy, self.timesteps, self.conditions)

    @cached_property
    def target(self) -> Tensor:
        """What should be predicted, (B, C, h, w)."""
        target = self.noising.target(self.batch)
        if self.teacher is None or self.asked == 0:
            return target
        return torch.cat([self.teacher(self), target[len(target) if self.asked is None else self.asked :]])

    @cached_property
    def timesteps(self) -> Tensor:
        """The timesteps as the denoiser counts them, (B,)."""
        return self.noising.timesteps(self.batch.steps)

    @cached_property
    def clean(self) -> Tensor:
        """The clean latents that the prediction implies, (B, C, h, w)."""
        return self.noising.clean(self.noisy, self.prediction, self.batch.steps)

    def predict(self, call: Any, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        """Call the denoiser, and return its prediction as latents (B, C, h, w) in float32."""
        return predict(self.denoiser, noisy, timesteps, conditions, call)


def predict(
    denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any], call: Any = None
) -> Tensor:
    """Return what a drop-in denoiser predicts, (B, C, h, w) in float32.

    noisy:      (B, C, h, w)
    timesteps:  (B,) as the denoiser counts them
    conditions: its other keyword arguments
    call:       what is called in its place, such as accelerate's wrapper; None: the denoiser itself
    """
    dtype = next(denoiser.experts.parameters()).dtype
    interface = denoiser.interface
    arguments = interface.denoiser_kwargs(denoiser.config, noisy.to(dtype), timesteps, conditions)
    size = (noisy.shape[-2], noisy.shape[-1])
    return interface.to_latents((call or denoiser)(**arguments, return_dict=False)[0], size).float()


@contextmanager
def evaluating(denoiser: Any) -> Iterator[None]:
    """Inside the context, nothing of the trained modules is dropped at random."""
    before = denoiser.training
    denoiser.eval()
    try:
        yield
    finally:
        denoiser.train(before)


class Objective(ABC):
    """One term of a training loss.

    extra_noise:   how many tensors of noise a sample needs besides the batch's own
    needs_weights: whether it reads the weights of the fused stages (see Pass.weights)
    """

    extra_noise: int = 0
    needs_weights: bool = False

    @abstractmethod
    def loss(self, work: Pass) -> Tensor:
        """Return the loss of each sample, (B,) float32, about 1 at the beginning; smaller is better."""

    def unweighted(self) -> "Objective":
        """Return the same objective with equal weights for all samples, to measure held-out images."""
        return self


@dataclass(frozen=True)
class Term:
    """An objective with its name and its weight in the sum."""

    name: str
    weight: float
    objective: Objective


@dataclass(frozen=True)
class ObjectiveContext:
    """What objectives are made of.

    settings: an ObjectiveSettings
    noising:  the forward process
    decoder:  latents -> images; None if no image is judged
    reward:   (images, captions) -> (B,); None if no image is judged
    """

    settings: Any
    noising: Noising
    decoder: Any = None
    reward: Any = None


class Total:
    """The weighted sum of several objectives."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.extra_noise = max(term.objective.extra_noise for term in self.terms)
        self.needs_weights = any(term.objective.needs_weights for term in self.terms)

    def losses(self, work: Pass) -> dict[str, Tensor]:
        """Return the loss of each sample, (B,), by term, without the terms' weights."""
        work.watched = self.needs_weights
        if self.needs_weights:
            _ = work.prediction  # fills the weights, whichever term comes first
        return {term.name: term.objective.loss(work) for term in self.terms}

    def sum(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum over terms, (B,)."""
        parts = [term.weight * losses[term.name] for term in self.terms]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class Mse(Objective):
    """The diffusion loss: the squared distance between prediction and target, which a teacher may give.

    snr_gamma: γ of min-SNR-γ weighting
    weighting: SD3's weighting of a flow, a name of noise.WEIGHTINGS
    bands:     weights of equal bands of timesteps, from little noise to much, which multiply the others
    Without them, all timesteps have the same weight.
    Raises UserError for a weighting of flows if the noise schedule is not one.
    """

    def __init__(
        self,
        noising: Noising,
        snr_gamma: float | None = None,
        weighting: str | None = None,
        bands: Sequence[float] | None = None,
    ) -> None:
        if weighting is not None and not noising.is_flow:
            raise UserError(
                f"--weighting {weighting} weighs a flow, and these experts predict "
                f"'{noising.kind}'; try --snr-gamma 5"
            )
        self.noising, self.snr_gamma, self.weighting = noising, snr_gamma, weighting
        self.bands = None if bands is None else torch.tensor(bands) * len(bands) / sum(bands)

    def loss(self, work: Pass) -> Tensor:
        error: Tensor = (work.prediction - work.target).square().mean((1, 2, 3))
        if self.bands is not None:
            band = work.batch.steps * len(self.bands) // self.noising.steps
            error = error * self.bands.to(error.device)[band]
        if self.weighting is not None:
            return error * self.noising.flow_weighting(work.batch.steps, self.weighting)
        if self.snr_gamma is not None:
            return error * self.noising.min_snr(work.batch.steps, self.snr_gamma)
        return error

    def unweighted(self) -> "Mse":
        return Mse(self.noising)


def make_mse(context: ObjectiveContext) -> Mse:
    settings = context.settings
    return Mse(context.noising, settings.snr_gamma, settings.weighting, settings.band_weights)


class Anchor(Objective):
    """The squared distance to the prediction with the parameters that the run began with.

    These are an untrained ensemble's, or those of the ensemble that is trained further.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.first = [parameter.detach().clone() for parameter in self.parameters]

    def loss(self, work: Pass) -> Tensor:
        prediction = work.prediction
        now = [parameter.data for parameter in self.parameters]
        try:
            self._put(self.first)
            with torch.no_grad(), evaluating(work.denoiser):
                before = work.predict(work.denoiser, work.noisy, work.timesteps, work.conditions)
        finally:
            self._put(now)
        return (prediction - before).square().mean((1, 2, 3))

    def _put(self, values: Sequence[Tensor]) -> None:
        """Set the values of the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value


class MeanAnchor(Objective):
    """The squared distance to the mean of the experts' own predictions: the noise average.

    Each expert makes one more pass, without gradients. Predictions of different kinds are converted.
    """

    def loss(self, work: Pass) -> Tensor:
        names, mean = work.denoiser.names, torch.zeros_like(work.noisy, dtype=torch.float32)
        for name in names:
            with torch.no_grad(), only_expert(work.denoiser, name):
                own = work.predict(work.denoiser, work.noisy, work.timesteps, work.conditions)
            mean += own / len(names)
        return (work.prediction - mean).square().mean((1, 2, 3))


class Sparsity(Objective):
    """The entropy of the experts' weights, mean over stages and places: 0 for one expert, 1 if all are equal.

    top: if given, instead of the entropy the weight outside the `top` largest weights, from 0 to 1 - top / N
    """

    needs_weights = True

    def __init__(self, top: int | None = None) -> None:
        self.top = top

    def loss(self, work: Pass) -> Tensor:
        return torch.stack([self._spread(weights.float()) for weights in work.weights.values()]).mean(0)

    def _spread(self, weights: Tensor) -> Tensor:
        """Return the loss of one stage's weights: (B, N, H, W) to (B,)."""
        experts = weights.shape[1]
        if self.top is not None:
            return 1 - weights.topk(min(self.top, experts), dim=1).values.sum(1).mean((1, 2))
        # entr(0) has an infinite slope, and a softmax can reach 0
        entropy = torch.special.entr(weights.clamp(min=1e-12)).sum(1).mean((1, 2))
        return entropy / math.log(max(2, experts))
