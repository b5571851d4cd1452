"""The walk: N experts past their stages in lockstep, fused where an aggregator stands.

Source: arXiv:2405.17082, section 3. Deviation: none where every stage is fused; unfused stages are ours.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afa.aggregators.base import Adjust, Aggregator
from afa.stages.stage import Stage, Trace

Column = tuple[Stage, ...]  # the same stage of every expert
Answer = Callable[[Tensor], Tensor]  # an expert's prediction as all understand it
Observer = Callable[[str, Tensor], None]  # told the name of a fused stage and its weights (B, N, H, W)
Adjuster = Callable[
    [str, Tensor], Tensor
]  # told the name of a fused stage and its weights (R, N, H, W), answers what to use instead


@dataclass
class Residuals:
    """What ControlNets and T2I-Adapters add, by the name of the stage after which it is added.

    to_hidden: to what goes on to the next stage (and is saved). to_skip: only to what is saved.
    """

    to_hidden: dict[str, Tensor] = field(default_factory=dict)
    to_skip: dict[str, Tensor] = field(default_factory=dict)


def walk(
    columns: Sequence[Column],
    aggregators: Mapping[str, Aggregator],
    hidden: Sequence[Tensor],
    traces: Sequence[Trace],
    residuals: Residuals,
    *,
    odd_size: bool = False,
    observe: Observer | None = None,
    checkpoint: bool = False,
    skipped: Collection[str] = (),
    blend_streams: bool = False,
    answers: Sequence[Answer] = (),
    adjust: Adjuster | None = None,
) -> Tensor:
    """Run a denoiser of N experts: -> the prediction of the last stage.

    hidden: N × (B, C, H, W), what enters each expert. aggregators: by stage name; a stage without one is not fused, and
    every expert keeps its own features and skips there. odd_size: a side does not divide by the down-sampling factor,
    so upsamplers are told the size of the next skip. checkpoint: recompute a column in the backward pass instead of
    keeping its activations. skipped: stages that are left out (skip-layer guidance). blend_streams: where image tokens are
    fused, so are text tokens; otherwise every expert keeps its own. answers: what becomes of each expert's own prediction
    before it is fused; none where they are predictions of one kind. adjust: changes weights before they are used, and observed.
    """
    temb = torch.stack([trace.temb for trace in traces]).mean(0)  # (B, E)
    text = torch.stack([trace.text for trace in traces]).mean(0)  # (B, T, D)
    kept = traces[0].kept  # all experts are given the same prompts
    features, traces = list(hidden), list(traces)
    skips: list[list[Tensor]] = []
    last = columns[-1][0].name
    for column in columns:
        stage = column[0]
        if stage.name not in skipped:
            skip: Sequence[Tensor | None] = skips.pop() if stage.takes_skip else [None] * len(column)
            size = _size(skips) if odd_size and stage.upsamples and skips else None
            aggregator = aggregators[stage.name] if stage.name in aggregators else None
            final = answers if stage.name == last else ()
            change = None if adjust is None else functools.partial(adjust, stage.name)
            step = (
                column,
                aggregator,
                features,
                traces,
                skip,
                size,
                temb,
                text,
                kept,
                blend_streams,
                final,
                change,
            )
            if checkpoint and torch.is_grad_enabled():
                features, traces, weights = torch.utils.checkpoint.checkpoint(
                    _step, *step, use_reentrant=False
                )
            else:
                features, traces, weights = _step(*step)
            if observe is not None and weights is not None:
                observe(stage.name, weights)
        features = _add(features, residuals.to_hidden.get(stage.name))
        if stage.saves_skip:
            skips.append(_add(features, residuals.to_skip.get(stage.name)))
    return features[0]


def _step(
    column: Column,
    aggregator: Aggregator | None,
    features: Sequence[Tensor],
    traces: Sequence[Trace],
    skip: Sequence[Tensor | None],
    size: tuple[int, int] | None,
    temb: Tensor,
    text: Tensor,
    kept: Tensor | None,
    blend_streams: bool,
    answers: Sequence[Answer],
    adjust: Adjust | None,
) -> tuple[list[Tensor], list[Trace], Tensor | None]:
    """One stage of all experts: -> what each carries on (the same tensor N times where one blend serves all), traces, weights."""
    ran = [
        stage.run(x, trace, s, size)
        for stage, x, trace, s in zip(column, features, traces, skip, strict=True)
    ]
    outputs, after = [output for output, _ in ran], [trace for _, trace in ran]
    if answers:
        outputs = [answer(output) for answer, output in zip(answers, outputs, strict=True)]
    if aggregator is None:
        return outputs, after, None
    fused, weights = aggregator(torch.stack(outputs, dim=1), temb, text, kept, adjust)
    if blend_streams and after[0].stream is not None:
        after = _with_one_stream(after, weights)
    return fused if isinstance(fused, list) else [fused] * len(column), after, weights


def _with_one_stream(traces: Sequence[Trace], weights: Tensor) -> list[Trace]:
    """Everyone's text tokens blended by what each expert weighs in the whole image: weights (B, N, H, W)."""
    streams = torch.stack(
        [trace.stream for trace in traces if trace.stream is not None], dim=1
    )  # (B, N, T, D)
    shares = weights.mean((2, 3)).to(streams.dtype)  # (B, N)
    stream = torch.einsum("bntd,bn->btd", streams, shares)
    return [dataclasses.replace(trace, stream=stream) for trace in traces]


def _size(skips: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
    height, width = skips[-1][0].shape[-2:]
    return height, width


def _add(features: list[Tensor], residual: Tensor | None) -> list[Tensor]:
    """Add a residual to what every expert carries, once where they carry the same."""
    if residual is None:
        return features
    first = features[0] + residual
    return [first if tensor is features[0] else tensor + residual for tensor in features]
