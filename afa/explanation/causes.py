"""What the weights owe to a word: the same latents again, without it.

A word is left out in two ways. *Hidden* from the aggregators, it still reaches them by what the experts make of it. *Omitted*
from the prompt, nobody reads it. Both change the weights on latents that were recorded with it, so nothing else differs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.switches import hide_tokens, watch_weights
from afa.explanation.recording import Recording
from afa.training.conditions import encode_prompt

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


def find_causes(pipeline: Any, denoiser: EnsembleDenoiser, recording: Recording, count: int = 4) -> Causes | None:
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
    return Causes(tuple(int(index) for index in chosen), _effects(hidden) if hidden else None, _effects(omitted))


def _without(pipeline: Any, denoiser: EnsembleDenoiser, recording: Recording) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """For every word, what makes of a call the same with the prompt that lacks it."""
    device, call = next(denoiser.parameters()).device, denoiser.call
    found = []
    for word in recording.words:
        with torch.no_grad():
            parts = call.parts(encode_prompt(pipeline, [word.left_out(recording.prompt)], device, guided=False))

        def changed(before: dict[str, Any], parts: Sequence[Tensor] = parts) -> dict[str, Any]:
            sizes = (before.get("added_cond_kwargs") or {}).get("time_ids")  # of SDXL, which belong to the image
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
    resized = [torch.nn.functional.interpolate(share[None, None], (height, width), mode="bilinear")[0, 0] for share in shares]
    moved = torch.stack([share.mean() for share in shares]).mean()
    return moved, torch.stack([change.mean((1, 2)) for change in changes]).mean(0), torch.stack(resized).mean(0)


def _effects(passes: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]]) -> Effects:
    """Means over passes."""
    moved, pull, places = (
        torch.stack([torch.stack([word[part] for word in words]) for words in passes]).mean(0).numpy() for part in range(3)
    )
    return Effects(moved.astype(np.float64), pull.astype(np.float64), places)
