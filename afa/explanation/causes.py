"""Counterfactuals: how weights and image change without a word, an expert or an expert's place.

Words: recorded passes are computed again on the same latents without one word, so nothing else differs.
*Hidden* words are masked in the aggregators only; the experts' features still depend on them.
*Omitted* words are removed from the prompt, so neither the experts nor the aggregators read them.

Images: the same request is sampled again with an expert off, or with weights swapped, frozen or equal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import adjust_weights, hide_tokens, scale_weights, watch_weights
from afa.errors import look_up
from afa.explanation.recording import Recording
from afa.explanation.settings import COUNTERFACTUALS
from afa.sampling.sample import Request, Sampling, sample
from afa.training.conditions import encode_prompt
from afa.training.measure import DROPPED

ESTIMATED = "an estimate by operations, not a measured time"
Maps = list[Tensor]  # of one pass, (N, h, w) of every fused stage


@dataclass(frozen=True)
class Effects:
    """The change of the weights when each of the U words is left out.

    All are means over passes, fused stages and places.

    moved:  (U,) share of the weight that moves to other experts: half the sum of |changes|; from 0 to 1
    pull:   (U, N) weight with the word minus weight without it; sums to 0 over N;
            positive: the word raises the expert's weight
    places: (U, h, w) moved at every place of the largest fused map
    """

    moved: NDArray[np.float64]
    pull: NDArray[np.float64]
    places: NDArray[np.float32]


@dataclass(frozen=True)
class Causes:
    """The effects of the words of a prompt.

    passes:  indices of the recorded passes that were computed again
    hidden:  effects of words that are masked in the aggregators; None if the aggregators read no text
    omitted: effects of words that are removed from the prompt
    """

    passes: tuple[int, ...]
    hidden: Effects | None
    omitted: Effects


def find_causes(
    pipeline: Any, denoiser: EnsembleDenoiser, recording: Recording, count: int = 4
) -> Causes | None:
    """Compute `count` recorded passes again, unchanged and twice without each word; they are evenly spaced.

    Costs count · (2U + 2) passes without guidance, where U is the number of words.
    Returns None if the prompt has no words or count is 0.
    """
    if not count or not recording.words:
        return None
    last = len(recording.calls) - 1
    chosen = np.unique(np.linspace(0, last, min(count, last + 1) + 2)[1:-1].round().astype(int))
    without = _without(pipeline, denoiser, recording)
    hidden, omitted = [], []
    for index in chosen:
        call = recording.calls[index]
        if recording.attention is not None:
            whole = _hidden(denoiser, call, ())
            hidden.append([_change(whole, _hidden(denoiser, call, word.tokens)) for word in recording.words])
        whole = _weights(denoiser, call)
        omitted.append([_change(whole, _weights(denoiser, changed(call))) for changed in without])
    return Causes(
        tuple(int(index) for index in chosen), _effects(hidden) if hidden else None, _effects(omitted)
    )


def _without(
    pipeline: Any, denoiser: EnsembleDenoiser, recording: Recording
) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """For each word, return a function that replaces the prompt of a call by the prompt without that word."""
    device, interface = next(denoiser.parameters()).device, denoiser.interface
    found = []
    for word in recording.words:
        with torch.no_grad():
            parts = interface.select_prompt_outputs(
                encode_prompt(pipeline, [word.left_out(recording.prompt)], device, guided=False)
            )

        def changed(before: dict[str, Any], parts: Sequence[Tensor] = parts) -> dict[str, Any]:
            sizes = (before.get("added_cond_kwargs") or {}).get("time_ids")  # SDXL: sizes of the image
            conditions = interface.conditions(denoiser.config, parts, sizes)  # type: ignore[arg-type]
            return interface.replace_prompts(before, conditions)

        found.append(changed)
    return found


def _weights(denoiser: EnsembleDenoiser, call: dict[str, Any]) -> Maps:
    """Compute one pass of one image and return its weight maps."""
    maps: Maps = []
    with torch.no_grad(), watch_weights(denoiser, lambda _, weights: maps.append(weights[-1].float().cpu())):
        denoiser(**call)
    return maps


def _hidden(denoiser: EnsembleDenoiser, call: dict[str, Any], tokens: Sequence[int]) -> Maps:
    """Compute one pass with some tokens masked in the aggregators."""
    with hide_tokens(denoiser, tokens):
        return _weights(denoiser, call)


def _change(whole: Maps, without: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """Return moved (), pull (N,) and places (h, w) of one word in one pass; see Effects."""
    height, width = max((maps.shape[-2:] for maps in whole), key=lambda size: size[0] * size[1])
    changes = [maps - other for maps, other in zip(whole, without, strict=True)]
    shares = [change.abs().sum(0) / 2 for change in changes]
    resized = [
        torch.nn.functional.interpolate(share[None, None], (height, width), mode="bilinear")[0, 0]
        for share in shares
    ]
    moved = torch.stack([share.mean() for share in shares]).mean()
    return (
        moved,
        torch.stack([change.mean((1, 2)) for change in changes]).mean(0),
        torch.stack(resized).mean(0),
    )


def _effects(passes: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]]) -> Effects:
    """Average the changes of all words (columns) over passes (rows)."""
    moved, pull, places = (
        torch.stack([torch.stack([word[part] for word in words]) for words in passes]).mean(0).numpy()
        for part in range(3)
    )
    return Effects(moved.astype(np.float64), pull.astype(np.float64), places)


Changes = dict[str, Callable[[], AbstractContextManager[None]]]  # title -> a context that changes the weights


@dataclass(frozen=True)
class Counterfactual:
    """An image that was sampled with changed weights.

    kind:  a name of settings.COUNTERFACTUALS
    title: what was changed
    image: (H, W, 3) uint8
    rmse:  root mean square difference from the unchanged image, in levels from 0 to 255
    """

    kind: str
    title: str
    image: NDArray[np.uint8]
    rmse: float


def counterfactuals(
    pipeline: Any,
    denoiser: EnsembleDenoiser,
    recording: Recording,
    request: Request,
    sampling: Sampling,
    kinds: Sequence[str],
) -> Iterator[Counterfactual]:
    """Sample the request again with changed weights, one image for each change.

    With guidance, the weights of both the conditional and the unconditional pass are changed.
    Raises ValueError for an unknown kind.
    """
    for kind in kinds:
        for title, change in look_up(kind, CHANGES, "counterfactual")(denoiser, recording).items():
            with change():
                image = sample(pipeline, [request], sampling)[0]
            yield Counterfactual(kind, title, image, rmse(recording.image, image))


def rmse(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Return the root mean square difference of two (H, W, 3) images, in levels from 0 to 255."""
    return float(np.sqrt(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)))


def _off(denoiser: EnsembleDenoiser, recording: Recording) -> Changes:
    """Turn off each expert in turn; the other experts share its weight in proportion to their own."""
    return {f"{name} off": partial(scale_weights, denoiser, {name: 0.0}) for name in denoiser.names}


def _swapped(denoiser: EnsembleDenoiser, recording: Recording) -> Changes:
    """Give every expert the weights of the expert before it; two experts exchange theirs."""
    names = denoiser.names
    order = [(index - 1) % len(names) for index in range(len(names))]
    title = " <-> ".join(names) if len(names) == 2 else "every expert in the next one's place"
    return {title: partial(adjust_weights, denoiser, permuted(denoiser, order))}


def _pairs(denoiser: EnsembleDenoiser, recording: Recording) -> Changes:
    """Exchange the weights of every two experts."""
    found: Changes = {}
    for one, other in combinations(range(len(denoiser.names)), 2):
        order = list(range(len(denoiser.names)))
        order[one], order[other] = other, one
        title = f"{denoiser.names[one]} <-> {denoiser.names[other]}"
        found[title] = partial(adjust_weights, denoiser, permuted(denoiser, order))
    return found


def _frozen(denoiser: EnsembleDenoiser, recording: Recording) -> Changes:
    """Average the weights over places; then over places and steps."""
    return {
        "one weight for all places": partial(adjust_weights, denoiser, without_places),
        "... and for all steps": partial(adjust_weights, denoiser, constant(denoiser, recording)),
    }


def _equal(denoiser: EnsembleDenoiser, recording: Recording) -> Changes:
    """Give all experts the same weight."""
    return {
        "equal weights": partial(
            adjust_weights, denoiser, lambda _, weights: torch.full_like(weights, 1 / weights.shape[1])
        )
    }


# By name, as in COUNTERFACTUALS; "skipped" is not here: it needs the recordings of all images, see Skipping.
CHANGES: dict[str, Callable[[EnsembleDenoiser, Recording], Changes]] = {
    "off": _off,
    "swapped": _swapped,
    "pairs": _pairs,
    "frozen": _frozen,
    "equal": _equal,
}
assert set(CHANGES) < set(COUNTERFACTUALS)


def permuted(denoiser: EnsembleDenoiser, order: Sequence[int]) -> Callable[[str, Tensor], Tensor]:
    """Return an adjuster that gives expert n the weights of expert order[n].

    Where the aggregator gives every expert its own blend (own_blends), the blends are permuted too.
    """

    def change(stage: str, weights: Tensor) -> Tensor:
        swapped = weights[:, list(order)]
        if denoiser.aggregators[stage].own_blends:
            swapped = swapped.unflatten(0, (-1, len(order)))[:, list(order)].flatten(0, 1)
        return swapped

    return change


def without_places(stage: str, weights: Tensor) -> Tensor:
    """Replace every weight map by its mean over places."""
    return weights.mean((2, 3), keepdim=True).expand_as(weights)


def constant(denoiser: EnsembleDenoiser, recording: Recording) -> Callable[[str, Tensor], Tensor]:
    """Return an adjuster that replaces the weights by the recorded mean over places and passes.

    The mean is taken for each stage, and for the conditional and the unconditional pass separately.
    """
    means: Mapping[tuple[bool, str], Tensor] = {key: rows.mean(0) for key, rows in recording.rows.items()}

    def change(stage: str, weights: Tensor) -> Tensor:
        return means[denoiser.in_uncond_pass, stage].to(weights)[:, :, None, None].expand_as(weights)

    return change


@dataclass(frozen=True)
class Unused:
    """The passes and stages at which an expert's mean weight stays below `threshold` in every image.

    experts: names (N)
    stages:  names of the fused stages (K)
    most:    (passes, K, N) an expert's mean weight, the largest over images; see Recording
    costs:   (K,) operations of one expert between the previous fused stage and this one
    """

    experts: tuple[str, ...]
    stages: tuple[str, ...]
    most: NDArray[np.float32]
    costs: NDArray[np.float64]
    threshold: float = DROPPED

    @property
    def cells(self) -> NDArray[np.bool_]:
        """(passes, K, N) True where the weight is below the threshold; never for all experts at once."""
        return self.most < min(self.threshold, 1 / len(self.experts))

    @property
    def counts(self) -> NDArray[np.int64]:
        """(N,) number of cells in which each expert is unused."""
        return self.cells.sum((0, 1))

    @property
    def total(self) -> int:
        """The number of cells of one expert: passes times fused stages."""
        return int(np.prod(self.cells.shape[:2]))

    @property
    def saved(self) -> NDArray[np.float64]:
        """(N,) estimated share of all experts' operations that skipping each expert where unused saves."""
        everything = len(self.most) * self.costs.sum() * len(self.experts)
        return np.einsum("pkn,k->n", self.cells, self.costs) / everything

    def data(self) -> dict[str, Any]:
        """Return the JSON values of explain.json."""
        return {
            "threshold": self.threshold,
            "cells": {
                name: self.cells[:, :, index].astype(int).tolist() for index, name in enumerate(self.experts)
            },
            "counts": dict(zip(self.experts, self.counts.tolist(), strict=True)),
            "stage_steps": self.total,
            "estimated_saving": dict(zip(self.experts, self.saved.tolist(), strict=True)),
            "sentences": self.sentences(),
        }

    def sentences(self) -> list[str]:
        """Return one sentence for each expert, and one for all experts together."""
        lines = []
        for name, count, saved in zip(self.experts, self.counts, self.saved, strict=True):
            share = f"{count} of {self.total} stage-steps ({count / self.total:.0%})"
            cost = (
                f"; skipping it there would save about {saved:.1%} of the experts' arithmetic"
                if count
                else ""
            )
            lines.append(f"{name} is below {self.threshold:g} at {share}{cost}.")
        return [
            *lines,
            f"Together about {self.saved.sum():.1%} of the experts' arithmetic; {ESTIMATED}.",
        ]


def find_unused(
    denoiser: EnsembleDenoiser,
    most: Sequence[NDArray[np.float32]],
    stage_costs: Mapping[str, int],
    threshold: float = DROPPED,
) -> Unused:
    """Find the cells in which an expert's weight stays below the threshold in every image.

    most:        Recording.most of every image
    stage_costs: operations of one expert by stage, fused or not
    """
    costs, running = [], 0.0
    # An expert that is unused at a fused stage is not needed from the previous fused stage on.
    for stage in denoiser.stages:
        running += stage_costs[stage.name]
        if stage.name in denoiser.fused:
            costs.append(running)
            running = 0.0
    return Unused(
        denoiser.names, tuple(denoiser.fused), np.max(np.stack(most), axis=0), np.asarray(costs), threshold
    )


class Skipping:
    """An adjuster of weights that gives the weight of unused experts to the others in proportion.

    The first fused stage counts the passes. If guidance runs two passes a step, they are counted separately.
    """

    def __init__(self, denoiser: EnsembleDenoiser, unused: Unused) -> None:
        self.denoiser, self.unused = denoiser, unused
        self._passes = {False: -1, True: -1}

    def __call__(self, stage: str, weights: Tensor) -> Tensor:
        place = self.unused.stages.index(stage)
        self._passes[self.denoiser.in_uncond_pass] += place == 0
        cells = self.unused.cells[self._passes[self.denoiser.in_uncond_pass], place]
        return without(weights, ~torch.from_numpy(cells))


def without(weights: Tensor, kept: Tensor) -> Tensor:
    """Set the weights of the other experts to 0 and scale those of the kept experts back to sum 1.

    weights: (R, N, H, W)
    kept:    (N,) bool
    Returns (R, N, H, W). Where all kept experts have weight 0, they get equal weights.
    """
    factors = kept.to(weights)[None, :, None, None]
    total = (weights * factors).sum(1, keepdim=True)
    return torch.where(
        total > 0, weights * factors / total.clamp_min(torch.finfo(total.dtype).tiny), factors / factors.sum()
    )
