"""Counterfactuals: an expert off, weights swapped or frozen, a word hidden, a stage skipped.

What the weights owe to a word: the same latents again, without it.

A word is left out in two ways. *Hidden* from the aggregators, it still reaches them by what the experts make of it. *Omitted*
from the prompt, nobody reads it. Both change the weights on latents that were recorded with it, so nothing else differs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

Maps = list[Tensor]  # of one pass, (N, h, w) of every fused stage


@dataclass(frozen=True)
class Effects:
    """What leaving out each of the U words changes: means over some passes, all fused stages and all places.

    moved (U,): the share of the weight that changes hands, half the sum of |changes| over experts; from 0 to 1.
    pull (U, N): weight with the word minus weight without it; above 0: the word calls for the expert. 0 in sum over experts.
    places (U, h, w): moved, place by place, on the largest fused map.
    """

    moved: NDArray[np.float64]
    pull: NDArray[np.float64]
    places: NDArray[np.float32]


@dataclass(frozen=True)
class Causes:
    """passes: of the recording, that were made again. hidden: from the aggregators, None if they read no text. omitted: from the prompt."""

    passes: tuple[int, ...]
    hidden: Effects | None
    omitted: Effects


def find_causes(
    pipeline: Any, denoiser: EnsembleDenoiser, recording: Recording, count: int = 4
) -> Causes | None:
    """Make `count` recorded passes again, spread evenly over the steps, once as they were and twice without each word.

    Costs count · (2U + 2) passes without guidance, where U is the number of words. None without words, or for no passes.
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
    """For every word, what makes of a call the same with the prompt that lacks it."""
    device, call = next(denoiser.parameters()).device, denoiser.call
    found = []
    for word in recording.words:
        with torch.no_grad():
            parts = call.parts(
                encode_prompt(pipeline, [word.left_out(recording.prompt)], device, guided=False)
            )

        def changed(before: dict[str, Any], parts: Sequence[Tensor] = parts) -> dict[str, Any]:
            sizes = (before.get("added_cond_kwargs") or {}).get(
                "time_ids"
            )  # of SDXL, which belong to the image
            return before | call.conditions(denoiser.config, parts, sizes)  # type: ignore[arg-type]

        found.append(changed)
    return found


def _weights(denoiser: EnsembleDenoiser, call: dict[str, Any]) -> Maps:
    """One pass of one image."""
    maps: Maps = []
    with torch.no_grad(), watch_weights(denoiser, lambda _, weights: maps.append(weights[-1].float().cpu())):
        denoiser(**call)
    return maps


def _hidden(denoiser: EnsembleDenoiser, call: dict[str, Any], tokens: Sequence[int]) -> Maps:
    with hide_tokens(denoiser, tokens):
        return _weights(denoiser, call)


def _change(whole: Maps, without: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """moved (), pull (N,), places (h, w) of one word in one pass."""
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
    """Means over passes."""
    moved, pull, places = (
        torch.stack([torch.stack([word[part] for word in words]) for words in passes]).mean(0).numpy()
        for part in range(3)
    )
    return Effects(moved.astype(np.float64), pull.astype(np.float64), places)


Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Counterfactual:
    """kind: of COUNTERFACTUALS. title: what was changed. image (H, W, 3) uint8. rmse: from the image as it is, in levels of 255."""

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
    """One image after another; with guidance, the weights of both halves are changed. Raises ValueError for an unknown kind."""
    for kind in kinds:
        for title, change in look_up(kind, CHANGES, "counterfactual")(denoiser, recording):
            with change():
                image = sample(pipeline, [request], sampling)[0]
            yield Counterfactual(kind, title, image, rmse(recording.image, image))


def rmse(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Root of the mean squared difference of two images' channels, in levels from 0 to 255."""
    return float(np.sqrt(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)))


def _off(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """Each expert without its weight, which the others share as they share the rest."""
    for name in denoiser.names:
        yield f"{name} off", lambda name=name: scale_weights(denoiser, {name: 0.0})  # type: ignore[misc]


def _swapped(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """Every expert plays the part of the one before it; of two, each the other's."""
    names = denoiser.names
    order = [(index - 1) % len(names) for index in range(len(names))]
    title = " <-> ".join(names) if len(names) == 2 else "every expert in the next one's place"
    yield title, lambda: adjust_weights(denoiser, permuted(denoiser, order))


def _pairs(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """Two experts play each other's part."""
    for one, other in combinations(range(len(denoiser.names)), 2):
        order = list(range(len(denoiser.names)))
        order[one], order[other] = other, one
        title = f"{denoiser.names[one]} <-> {denoiser.names[other]}"
        yield title, lambda order=order: adjust_weights(denoiser, permuted(denoiser, order))  # type: ignore[misc]


def _frozen(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    """First without places, then without steps, too."""
    yield "one weight for all places", lambda: adjust_weights(denoiser, without_places)
    yield "... and for all steps", lambda: adjust_weights(denoiser, constant(denoiser, recording))


def _equal(denoiser: EnsembleDenoiser, recording: Recording) -> Iterator[tuple[str, Change]]:
    yield (
        "equal weights",
        lambda: adjust_weights(denoiser, lambda _, weights: torch.full_like(weights, 1 / weights.shape[1])),
    )


# kind, as in COUNTERFACTUALS -> (denoiser, recording) -> titles and what to switch on; "skipped" is in skipping.py: it needs all images
CHANGES: dict[str, Callable[[EnsembleDenoiser, Recording], Iterator[tuple[str, Change]]]] = {
    "off": _off,
    "swapped": _swapped,
    "pairs": _pairs,
    "frozen": _frozen,
    "equal": _equal,
}
assert set(CHANGES) < set(COUNTERFACTUALS)


def permuted(denoiser: EnsembleDenoiser, order: Sequence[int]) -> Callable[[str, Tensor], Tensor]:
    """Expert n plays the part of expert order[n]: it gets that one's weights and, where everyone has a blend of its own, that one's blend."""

    def change(stage: str, weights: Tensor) -> Tensor:
        swapped = weights[:, list(order)]
        if denoiser.aggregators[stage].own_blends:
            swapped = swapped.unflatten(0, (-1, len(order)))[:, list(order)].flatten(0, 1)
        return swapped

    return change


def without_places(stage: str, weights: Tensor) -> Tensor:
    """Every map at its mean."""
    return weights.mean((2, 3), keepdim=True).expand_as(weights)


def constant(denoiser: EnsembleDenoiser, recording: Recording) -> Callable[[str, Tensor], Tensor]:
    """Every stage at its recorded mean over places and passes, each half of guidance at its own."""
    means: Mapping[tuple[bool, str], Tensor] = {key: rows.mean(0) for key, rows in recording.rows.items()}

    def change(stage: str, weights: Tensor) -> Tensor:
        return means[denoiser.in_uncond_pass, stage].to(weights)[:, :, None, None].expand_as(weights)

    return change


@dataclass(frozen=True)
class Unused:
    """Where experts stay below `threshold` in every image.

    most (passes, K, N): the largest over images of an expert's mean weight, see Recording. cells: where that is
    below the threshold; never all experts at once. costs (K,): operations of one expert from the fused stage before up to this one.
    """

    experts: tuple[str, ...]
    stages: tuple[str, ...]
    most: NDArray[np.float32]
    costs: NDArray[np.float64]
    threshold: float = DROPPED

    @property
    def cells(self) -> NDArray[np.bool_]:
        return self.most < min(self.threshold, 1 / len(self.experts))

    @property
    def counts(self) -> NDArray[np.int64]:
        """In how many cells each expert is unused (N,)."""
        return self.cells.sum((0, 1))

    @property
    def total(self) -> int:
        """Cells an expert has: passes times fused stages."""
        return int(np.prod(self.cells.shape[:2]))

    @property
    def saved(self) -> NDArray[np.float64]:
        """What leaving each expert out there would save (N,), as a share of all experts' arithmetic. An estimate: see the docs."""
        everything = len(self.most) * self.costs.sum() * len(self.experts)
        return np.einsum("pkn,k->n", self.cells, self.costs) / everything

    def sentences(self) -> list[str]:
        """What can be said, an expert each, and of all together."""
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
            f"Together about {self.saved.sum():.1%} of the experts' arithmetic; an estimate by operations, not a measured time.",
        ]


def find_unused(
    denoiser: EnsembleDenoiser,
    most: Sequence[NDArray[np.float32]],
    stage_costs: Mapping[str, int],
    threshold: float = DROPPED,
) -> Unused:
    """most: of every image, from its recording; stage_costs: of one expert, by stage, fused or not."""
    costs, running = [], 0.0
    for (
        stage
    ) in denoiser.stages:  # an expert that is not used at a fused stage was not needed since the one before
        running += stage_costs[stage.name]
        if stage.name in denoiser.fused:
            costs.append(running)
            running = 0.0
    return Unused(
        denoiser.names, tuple(denoiser.fused), np.max(np.stack(most), axis=0), np.asarray(costs), threshold
    )


class Skipping:
    """An adjuster that leaves experts out where they are unused, and gives their weight to the others in proportion.

    Passes are counted by the first fused stage, the two that guidance may make of a step apart.
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
    """weights (R, N, H, W) of the experts that are kept (N,) bool, brought back to sum 1; where they all weigh nothing, they share alike."""
    factors = kept.to(weights)[None, :, None, None]
    total = (weights * factors).sum(1, keepdim=True)
    return torch.where(
        total > 0, weights * factors / total.clamp_min(torch.finfo(total.dtype).tiny), factors / factors.sum()
    )
