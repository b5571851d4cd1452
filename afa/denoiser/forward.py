"""The loop of an ensemble: run each stage of all N experts, then fuse their features if it has an aggregator.

Shapes: B batch, N experts, C channels, H and W of a stage's map, E time width, T tokens, D text width.
Source: arXiv:2405.17082, section 3. Deviation: none where every stage is fused; unfused stages are ours.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from afa.aggregators.base import Aggregator
from afa.denoiser.parallel import ExpertGroup
from afa.denoiser.reuse import InnerStages
from afa.stages.stage import Stage, StageContext

ParallelStages = tuple[Stage, ...]  # the same stage of every expert
Converter = Callable[[Tensor], Tensor]  # an expert's prediction -> the same prediction, of the common kind
Observer = Callable[[str, Tensor], None]  # (name of a fused stage, its weights (B, N, H, W))
# (name of a fused stage, its weights (R, N, H, W)) -> the weights to use instead
Adjuster = Callable[[str, Tensor], Tensor]


@dataclass(kw_only=True)
class PassOptions:
    """What one pass does besides running stages and fusing features.

    residuals:      stage name -> (B, C, H, W), added to the stage's output and so to its skip connection, too
                    (ControlNet, T2I-Adapter)
    skip_residuals: stage name -> (B, C, H, W), added to the stage's skip connection only (ControlNet)
    skipped:        names of stages that are left out (skip-layer guidance)
    odd_size:       True if a side of the latents is no multiple of the down-sampling factor; each upsampler
                    then makes the size of the next skip connection
    converters:     stage name -> N functions, applied to each expert's output before it is fused
    fuse_text:      fuse text tokens, too, wherever image tokens are fused
    checkpoint:     names of stages that are recomputed in the backward pass instead of keeping activations
    group:          processes that share the experts; None: all are here
    inner:          stages that may be left out; None: all stages run
    adjust:         returns the weights to use at a fused stage, instead of the aggregator's
    observe:        called with the weights that a fused stage used
    """

    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    skip_residuals: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: Collection[str] = ()
    odd_size: bool = False
    converters: Mapping[str, Sequence[Converter]] = field(default_factory=dict)
    fuse_text: bool = False
    checkpoint: Collection[str] = ()
    group: ExpertGroup | None = None
    inner: InnerStages | None = None
    adjust: Adjuster | None = None
    observe: Observer | None = None


class AggregatorInputs(NamedTuple):
    """What every aggregator sees besides features: the means over the experts.

    temb:      (B, E) time embedding
    text:      (B, T, D) text states
    text_mask: (B, T) bool, False for padding; None: no padding. All experts are given the same prompts
    """

    temb: Tensor
    text: Tensor
    text_mask: Tensor | None


def run_stages(
    parallel_stages: Sequence[ParallelStages],
    aggregators: Mapping[str, Aggregator],
    hidden: Sequence[Tensor],
    contexts: Sequence[StageContext],
    options: PassOptions,
) -> Tensor:
    """Run all stages of N experts and return the prediction of the last stage, (B, C, H, W).

    parallel_stages: for each stage, in order: this stage of every expert
    aggregators:     stage name -> aggregator; at a stage without one, every expert keeps its own features
    hidden:          N × (B, C, H, W), the input of each expert's first stage
    contexts:        N, one per expert
    If several processes share the experts, everything is of this one's experts.
    """
    group = options.group
    times, texts = [context.temb for context in contexts], [context.text for context in contexts]
    if group is not None:
        group.passes += 1
        times, texts = group.gather(times), group.gather(texts)
    temb, text = torch.stack(times).mean(0), torch.stack(texts).mean(0)
    seen = AggregatorInputs(temb, text, contexts[0].text_mask)
    features = list(hidden)
    skips: list[list[Tensor]] = []  # one entry per saved skip connection: that of every expert
    inner = options.inner
    for position, same_stage in enumerate(parallel_stages):
        stage = same_stage[0]
        if inner is not None:
            if inner.left_out and inner.first <= position < inner.end:
                continue
            if position == inner.end:
                features = inner.handed_on(features)
        if stage.name not in options.skipped:
            skip = skips.pop() if stage.takes_skip else [None] * len(same_stage)
            size = _size(skips[-1][0]) if options.odd_size and stage.upsamples and skips else None
            step = partial(_run_and_fuse, same_stage, aggregators.get(stage.name), seen, options)
            if stage.name in options.checkpoint and torch.is_grad_enabled():
                step = partial(checkpoint, step, use_reentrant=False)
            features, contexts, weights = step(features, contexts, skip, size)
            if options.observe is not None and weights is not None:
                options.observe(stage.name, weights)
        features = _add(features, options.residuals.get(stage.name))
        if stage.saves_skip:
            skips.append(_add(features, options.skip_residuals.get(stage.name)))
    return features[0]


def _run_and_fuse(
    same_stage: ParallelStages,
    aggregator: Aggregator | None,
    seen: AggregatorInputs,
    options: PassOptions,
    features: Sequence[Tensor],
    contexts: Sequence[StageContext],
    skip: Sequence[Tensor | None],
    size: tuple[int, int] | None,
) -> tuple[list[Tensor], list[StageContext], Tensor | None]:
    """Run one stage of all experts, and fuse their features if the stage has an aggregator.

    Returns every expert's features (one tensor N times if one blend serves all) and context, and the weights.
    """
    name = same_stage[0].name
    each = zip(same_stage, features, contexts, skip, strict=True)
    ran = [stage.run(x, context, own_skip, size) for stage, x, context, own_skip in each]
    outputs, after = [output for output, _ in ran], [context for _, context in ran]
    if name in options.converters:
        outputs = [convert(x) for convert, x in zip(options.converters[name], outputs, strict=True)]
    if aggregator is None:
        return outputs, after, None
    adjust = None if options.adjust is None else partial(options.adjust, name)
    group = options.group
    fused, weights = aggregator(outputs if group is None else group.gather(outputs), *seen, adjust)
    if options.fuse_text and after[0].text_tokens is not None:
        after = _fuse_text_tokens(after, weights, group)
    if not isinstance(fused, list):
        fused = [fused] * len(same_stage)
    elif group is not None:
        fused = [fused[index] for index in group.own]
    return fused, after, weights


def _fuse_text_tokens(
    contexts: Sequence[StageContext], weights: Tensor, group: ExpertGroup | None
) -> list[StageContext]:
    """Blend the experts' text tokens by each expert's mean weight over the image. weights: (B, N, H, W)."""
    tokens = [context.text_tokens for context in contexts if context.text_tokens is not None]
    if group is not None:
        tokens = group.gather(tokens)
    stacked = torch.stack(tokens, dim=1)  # (B, N, T, D)
    shares = weights.mean((2, 3)).to(stacked.dtype)  # (B, N)
    fused = torch.einsum("bntd,bn->btd", stacked, shares)
    return [dataclasses.replace(context, text_tokens=fused) for context in contexts]


def _size(features: Tensor) -> tuple[int, int]:
    return features.shape[-2], features.shape[-1]


def _add(features: list[Tensor], residual: Tensor | None) -> list[Tensor]:
    """Add a residual to every expert's features, only once if all experts share one tensor."""
    if residual is None:
        return features
    first = features[0] + residual
    return [first if tensor is features[0] else tensor + residual for tensor in features]
