"""Noise average, feature mean, and one expert at a time: by intervals of timesteps, or in turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.ensemble import Ensemble
from afa.errors import UserError, unknown
from afa.sampling.base import Combination, Predict
from afa.sampling.options import ExpertSwitch, MethodOptions, NoiseAverage, TimestepExperts
from afa.sampling.sample import PipelineSampler, find_expert, in_frame, settled
from afa.settings import shares


def average(predictions: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of predictions, Σ wᵢ pᵢ.

    predictions: (B, N, C, H, W)
    weights:     (N,) or (B, N), with sum 1 over N
    Returns (B, C, H, W). Computed as p₀ + Σ wᵢ (pᵢ - p₀), so that the mean of equal predictions is bit for
    bit the same prediction.
    """
    first = predictions[:, 0]
    total = first
    for expert in range(1, predictions.shape[1]):
        share = weights[..., expert].to(predictions).reshape(-1, 1, 1, 1)
        total = total + share * (predictions[:, expert] - first)
    return total


class Averaged(Combination):
    """The weighted mean of the experts' predictions.

    weights: one per expert, with sum 1; experts with weight 0 are not run
    """

    def __init__(self, denoiser: EnsembleDenoiser, weights: Sequence[float]) -> None:
        super().__init__(denoiser)
        self.weights = torch.tensor(weights)

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        run = [expert for expert, weight in enumerate(self.weights) if weight > 0]
        return average(
            torch.stack([predict(expert) for expert in run], dim=1), self.weights[run]
        ), self.weights


def noise_average(ensemble: Ensemble, options: NoiseAverage) -> PipelineSampler:
    """Return a sampler of ε = Σ wᵢ εᵢ, in which each expert has its own text encoders.

    It works for any kind of prediction, since all kinds are linear in ε.
    """
    weights = shares(options.weights, len(ensemble.names))
    return PipelineSampler(in_frame(ensemble, Averaged(ensemble.denoiser, weights)))


def feature_mean(ensemble: Ensemble, options: MethodOptions) -> PipelineSampler:
    """Return a sampler of the ensemble with the mean of the features at every stage: untrained AFA."""
    return PipelineSampler(settled(ensemble.sharing("mean").pipeline(), ensemble.experts[0]))


@dataclass(frozen=True)
class Interval:
    """The timesteps start > t >= end belong to one expert."""

    start: int
    end: int
    expert: str

    def __str__(self) -> str:
        return f"{self.start}-{self.end}:{self.expert}"


def equal_intervals(names: Sequence[str], steps: int) -> list[Interval]:
    """Divide the timesteps 0 … steps-1 equally; the first expert gets those with the most noise."""
    bounds = [round(steps * (len(names) - place) / len(names)) for place in range(len(names) + 1)]
    return [
        Interval(start, end, name) for start, end, name in zip(bounds[:-1], bounds[1:], names, strict=True)
    ]


def read_table(text: str, names: Sequence[str], steps: int) -> list[Interval]:
    """Read intervals of timesteps, from noise to image.

    text:  FROM-TO:EXPERT,…
    Raises UserError unless they cover the timesteps 0 … steps-1 exactly once.
    """
    intervals = sorted(
        (_read(entry.strip(), names) for entry in text.split(",")), key=lambda interval: -interval.start
    )
    expected = steps
    for interval in intervals:
        if interval.start > expected:
            other = f"{steps} timesteps" if expected == steps else "the interval before it"
            raise UserError(f"table {text}: {interval} overlaps {other}; it must start at {expected}")
        if interval.start < expected:
            raise UserError(
                f"table {text}: no expert is given for {expected}-{interval.start}; {interval} must start at"
                f" {expected}"
            )
        expected = interval.end
    if expected > 0:
        raise UserError(f"table {text}: no expert is given for {expected}-0; the last interval must end at 0")
    return intervals


def at(intervals: Sequence[Interval], timestep: float) -> Interval:
    """Return the interval of a timestep; the timestep may be a fraction."""
    return next((interval for interval in intervals if timestep >= interval.end), intervals[-1])


def _read(text: str, names: Sequence[str]) -> Interval:
    span, _, name = text.partition(":")
    start, _, end = span.partition("-")
    if not (start.strip().isdecimal() and end.strip().isdecimal() and int(start) > int(end) and name):
        raise UserError(
            f"table entry '{text}' is no interval; write FROM-TO:EXPERT with whole timesteps, FROM above TO,"
            f" e.g. 1000-700:{names[0]}"
        )
    if name not in names:
        raise UserError(unknown(name, names, "expert"))
    return Interval(int(start), int(end), name)


class ByTimestep(Combination):
    """Runs one expert at every step, by the interval of its timestep."""

    def __init__(self, denoiser: EnsembleDenoiser, intervals: Sequence[Interval]) -> None:
        super().__init__(denoiser)
        self.intervals = list(intervals)

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        expert = self.names.index(at(self.intervals, timestep).expert)
        return predict(expert), self.one_hot(expert)


def timestep_experts(ensemble: Ensemble, options: TimestepExperts) -> PipelineSampler:
    """Return a sampler that runs one expert for each interval of timesteps.

    Source: arXiv:2211.01324, section 4. Deviation: there, experts are trained for their intervals.
    Raises UserError for a table with gaps or overlaps.
    """
    steps = ensemble.frame.scheduler.config.num_train_timesteps
    table = options.table
    intervals = (
        equal_intervals(ensemble.names, steps) if table is None else read_table(table, ensemble.names, steps)
    )
    return PipelineSampler(in_frame(ensemble, ByTimestep(ensemble.denoiser, intervals)))


class InTurn(Combination):
    """Runs one expert at every step, in turns.

    order:     indices of the experts, in turn
    every:     steps of one turn
    scheduler: the pipeline's, whose timesteps are counted; the sampler sets it
    """

    scheduler: Any

    def __init__(self, denoiser: EnsembleDenoiser, order: Sequence[int], every: int) -> None:
        super().__init__(denoiser)
        self.order, self.every = list(order), every

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        # Both passes of guidance, and all evaluations at one timestep, belong to one step.
        times = self.scheduler.timesteps.double().unique().flip(0).cpu()
        step = int((times - timestep).abs().argmin())
        expert = self.order[step // self.every % len(self.order)]
        return predict(expert), self.one_hot(expert)


def expert_switch(ensemble: Ensemble, options: ExpertSwitch) -> PipelineSampler:
    """Return a sampler that runs the experts in turn, each for a few steps.

    Source: LoRA Switch of Zhong et al., Multi-LoRA Composition for Image Generation, arXiv:2402.16843.
    Deviation: there, LoRAs on one base take turns; here, whole experts.
    Raises UserError for an unknown name in the order.
    """
    names = options.order or ensemble.names
    turns = InTurn(ensemble.denoiser, [find_expert(ensemble, name) for name in names], options.every)
    pipeline = in_frame(ensemble, turns)
    turns.scheduler = pipeline.scheduler
    return PipelineSampler(pipeline)
