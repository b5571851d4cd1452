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
from afa.stages.stage import Stage, StageContext

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
    contexts: Sequence[StageContext],
    residuals: Residuals,
    *,
    odd_size: bool = False,
    observe: Observer | None = None,
    checkpoint: bool = False,
    skipped: Collection[str] = (),
    fuse_text: bool = False,
    answers: Sequence[Answer] = (),
    adjust: Adjuster | None = None,
) -> Tensor:
    """Run all stages of N experts and return the prediction of the last stage.

    parallel_stages: one tuple per stage: this stage of every expert
    aggregators:     stage name -> aggregator; at a stage without one, every expert keeps its own features
    hidden:          N × (B, C, H, W), the input of each expert's first stage
    contexts:          N contexts, one per expert
    residuals:       of ControlNets and T2I-Adapters
    odd_size:        True if a side of the latents is no multiple of the down-sampling factor; each upsampler
                     then makes the size of the next skip connection
    observe:         called with each fused stage's name and weights
    checkpoint:      recompute each stage in the backward pass instead of keeping its activations
    skipped:         names of stages that are left out (skip-layer guidance)
    fuse_text:       fuse text tokens, too, wherever image tokens are fused
    answers:         N conversions of each expert's prediction, applied before it is fused; empty: none
    adjust:          changes the weights of each fused stage before they are used and observed
    Returns (B, C, H, W).
    """
    temb = torch.stack([context.temb for context in contexts]).mean(0)  # (B, E)
    text = torch.stack([context.text for context in contexts]).mean(0)  # (B, T, D)
    text_mask = contexts[0].text_mask  # all experts are given the same prompts
    features, contexts = list(hidden), list(contexts)
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
                contexts,
                skip,
                size,
                temb,
                text,
                text_mask,
                fuse_text,
                final,
                change,
            )
            if checkpoint and torch.is_grad_enabled():
                features, contexts, weights = torch.utils.checkpoint.checkpoint(
                    _step, *step, use_reentrant=False
                )
            else:
                features, contexts, weights = _step(*step)
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
    contexts: Sequence[StageContext],
    skip: Sequence[Tensor | None],
    size: tuple[int, int] | None,
    temb: Tensor,
    text: Tensor,
    text_mask: Tensor | None,
    fuse_text: bool,
    answers: Sequence[Answer],
    adjust: Adjust | None,
) -> tuple[list[Tensor], list[StageContext], Tensor | None]:
    """Run one stage of all experts, and fuse their features if the stage has an aggregator.

    Returns every expert's features (one tensor N times if one blend serves all) and context, and the weights.
    """
    ran = [
        stage.run(x, context, s, size)
        for stage, x, context, s in zip(same_stage, features, contexts, skip, strict=True)
    ]
    outputs, after = [output for output, _ in ran], [context for _, context in ran]
    if answers:
        outputs = [answer(output) for answer, output in zip(answers, outputs, strict=True)]
    if aggregator is None:
        return outputs, after, None
    fused, weights = aggregator(torch.stack(outputs, dim=1), temb, text, text_mask, adjust)
    if fuse_text and after[0].text_tokens is not None:
        after = _fuse_text_tokens(after, weights)
    return fused if isinstance(fused, list) else [fused] * len(same_stage), after, weights


def _fuse_text_tokens(contexts: Sequence[StageContext], weights: Tensor) -> list[StageContext]:
    """Blend the experts' text tokens by each expert's mean weight over the image. weights: (B, N, H, W)."""
    tokens = [context.text_tokens for context in contexts if context.text_tokens is not None]
    stacked = torch.stack(tokens, dim=1)  # (B, N, T, D)
    shares = weights.mean((2, 3)).to(stacked.dtype)  # (B, N)
    fused = torch.einsum("bntd,bn->btd", stacked, shares)
    return [dataclasses.replace(context, text_tokens=fused) for context in contexts]


def _size(skips: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
    height, width = skips[-1][0].shape[-2:]
    return height, width


def _add(features: list[Tensor], residual: Tensor | None) -> list[Tensor]:
    """Add a residual to every expert's features, only once if all experts share one tensor."""
    if residual is None:
        return features
    first = features[0] + residual
    return [first if tensor is features[0] else tensor + residual for tensor in features]
