"""The loop of an ensemble: run each stage of all N experts, then fuse their features if it has an aggregator.

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

ParallelStages = tuple[Stage, ...]  # the same stage of every expert
Answer = Callable[[Tensor], Tensor]  # converts an expert's prediction to the common kind
Observer = Callable[[str, Tensor], None]  # (name of a fused stage, its weights (B, N, H, W))
# (name of a fused stage, its weights (R, N, H, W)) -> the weights to use instead
Adjuster = Callable[[str, Tensor], Tensor]


@dataclass
class Residuals:
    """What ControlNets and T2I-Adapters add, by the name of the stage after which it is added.

    to_hidden: added to the features for the next stage, and so to the skip connection, too
    to_skip:   added to the skip connection only
    """

    to_hidden: dict[str, Tensor] = field(default_factory=dict)
    to_skip: dict[str, Tensor] = field(default_factory=dict)


def run_stages(
    parallel_stages: Sequence[ParallelStages],
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
    """Run all stages of N experts and return the prediction of the last stage.

    parallel_stages: one tuple per stage: this stage of every expert
    aggregators:     stage name -> aggregator; at a stage without one, every expert keeps its own features
    hidden:          N × (B, C, H, W), the input of each expert's first stage
    traces:          N traces, one per expert
    residuals:       of ControlNets and T2I-Adapters
    odd_size:        True if a side of the latents is no multiple of the down-sampling factor; each upsampler
                     then makes the size of the next skip connection
    observe:         called with each fused stage's name and weights
    checkpoint:      recompute each stage in the backward pass instead of keeping its activations
    skipped:         names of stages that are left out (skip-layer guidance)
    blend_streams:   fuse text tokens, too, wherever image tokens are fused
    answers:         N conversions of each expert's prediction, applied before it is fused; empty: none
    adjust:          changes the weights of each fused stage before they are used and observed
    Returns (B, C, H, W).
    """
    temb = torch.stack([trace.temb for trace in traces]).mean(0)  # (B, E)
    text = torch.stack([trace.text for trace in traces]).mean(0)  # (B, T, D)
    text_mask = traces[0].text_mask  # all experts are given the same prompts
    features, traces = list(hidden), list(traces)
    skips: list[list[Tensor]] = []
    last = parallel_stages[-1][0].name
    for same_stage in parallel_stages:
        stage = same_stage[0]
        if stage.name not in skipped:
            skip: Sequence[Tensor | None] = skips.pop() if stage.takes_skip else [None] * len(same_stage)
            size = _size(skips) if odd_size and stage.upsamples and skips else None
            aggregator = aggregators[stage.name] if stage.name in aggregators else None
            final = answers if stage.name == last else ()
            change = None if adjust is None else functools.partial(adjust, stage.name)
            step = (
                same_stage,
                aggregator,
                features,
                traces,
                skip,
                size,
                temb,
                text,
                text_mask,
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
    same_stage: ParallelStages,
    aggregator: Aggregator | None,
    features: Sequence[Tensor],
    traces: Sequence[Trace],
    skip: Sequence[Tensor | None],
    size: tuple[int, int] | None,
    temb: Tensor,
    text: Tensor,
    text_mask: Tensor | None,
    blend_streams: bool,
    answers: Sequence[Answer],
    adjust: Adjust | None,
) -> tuple[list[Tensor], list[Trace], Tensor | None]:
    """Run one stage of all experts, and fuse their features if the stage has an aggregator.

    Returns each expert's features (the same tensor N times if one blend serves all), traces, and the weights.
    """
    ran = [
        stage.run(x, trace, s, size)
        for stage, x, trace, s in zip(same_stage, features, traces, skip, strict=True)
    ]
    outputs, after = [output for output, _ in ran], [trace for _, trace in ran]
    if answers:
        outputs = [answer(output) for answer, output in zip(answers, outputs, strict=True)]
    if aggregator is None:
        return outputs, after, None
    fused, weights = aggregator(torch.stack(outputs, dim=1), temb, text, text_mask, adjust)
    if blend_streams and after[0].stream is not None:
        after = _with_one_stream(after, weights)
    return fused if isinstance(fused, list) else [fused] * len(same_stage), after, weights


def _with_one_stream(traces: Sequence[Trace], weights: Tensor) -> list[Trace]:
    """Blend the experts' text tokens by each expert's mean weight over the image. weights: (B, N, H, W)."""
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
    """Add a residual to every expert's features, only once if all experts share one tensor."""
    if residual is None:
        return features
    first = features[0] + residual
    return [first if tensor is features[0] else tensor + residual for tensor in features]
