"""Which words the aggregators look at, and how the experts' weights lie on what they look at.

Attention says where an aggregator looks, not that the word is why the weights are as they are; for that, see causes.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.explanation.words import Word

AREA = 4  # a word's area: the 1/AREA of the places that look at it most


@dataclass(frozen=True)
class Attention:
    """Means over passes, heads and layers, for the U words of a recording.

    maps: by stage that reads, (U, h, w): the probability with which a place looks at the word's tokens.
    lean: by stage, (U, N): an expert's mean weight in the quarter of the places that look at the word most, minus its mean weight
    elsewhere; from -1 to 1, 0 in sum over experts.
    """

    maps: dict[str, NDArray[np.float32]]
    lean: dict[str, NDArray[np.float32]]

    @property
    def looked(self) -> NDArray[np.float64]:
        """The share of all looking that goes to each word (U,): mean over stages. What is missing to 1 goes to tokens that are no words."""
        return np.mean([maps.mean((1, 2), dtype=np.float64) for maps in self.maps.values()], axis=0)

    @property
    def leans(self) -> NDArray[np.float64]:
        """lean, mean over stages: (U, N)."""
        return np.mean(list(self.lean.values()), axis=0, dtype=np.float64)


class Listener:
    """Sums up attention to words while an image is made. read: finds the words in a text of so many tokens."""

    def __init__(self, denoiser: EnsembleDenoiser, read: Callable[[int], Sequence[Word]]) -> None:
        self.denoiser, self.read = denoiser, read
        self.words: Sequence[Word] | None = None
        self._layers: dict[str, list[Tensor]] = {}  # of the pass that is made: (U, P) a layer
        self._maps: dict[str, Tensor] = {}
        self._lean: dict[str, Tensor] = {}
        self._passes: dict[str, int] = {}

    @property
    def reading(self) -> list[str]:
        """The stages whose aggregators read the text."""
        return [stage for stage in self.denoiser.fused if self.denoiser.aggregators[stage].reads]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen inside."""
        with ExitStack() as stack:
            first = self.denoiser.aggregators[self.denoiser.fused[0]]
            stack.callback(first.register_forward_pre_hook(self._meet).remove)
            for stage in self.reading:
                for block in self.denoiser.aggregators[stage].transformer.transformer_blocks:
                    stack.callback(block.attn2.register_forward_pre_hook(self._hook(stage), with_kwargs=True).remove)
            yield

    def _meet(self, aggregator: Any, args: tuple[Any, ...]) -> None:
        """The text is seen for the first time."""
        if self.words is None:
            self.words = self.read(args[2].shape[1])  # features, temb, text, as walk calls it

    def _hook(self, stage: str) -> Callable[..., None]:
        def listen(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if self.denoiser.aside:
                return
            states, mask = kwargs["encoder_hidden_states"], kwargs.get("attention_mask")
            assert self.words is not None
            found = probabilities(layer, args[0][-1:], states[-1:], None if mask is None else mask[-1:])
            self._layers.setdefault(stage, []).append(per_word(found, self.words))

        return listen

    def weighed(self, stage: str, weights: Tensor) -> None:
        """A stage's weights (N, h, w) are known: add up how they lie on what was looked at."""
        layers = self._layers.pop(stage, [])
        if not layers or not self.words:
            return
        looked = torch.stack(layers).mean(0)  # (U, P)
        for sums, found in ((self._maps, looked.unflatten(1, weights.shape[1:])), (self._lean, lean(looked, weights.flatten(1)))):
            sums[stage] = sums[stage] + found.cpu() if stage in sums else found.cpu()
        self._passes[stage] = self._passes.get(stage, 0) + 1

    def heard(self) -> Attention | None:
        """The means; None if nobody read, or there was no word."""
        if not self._maps:
            return None
        maps, leans = ({stage: (total / self._passes[stage]).numpy() for stage, total in sums.items()} for sums in (self._maps, self._lean))
        return Attention(maps, leans)


def probabilities(layer: Any, hidden: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q·Kᵀ) of a diffusers `Attention` as it is about to compute it, mean over heads: (1, P, C), (1, T, D) -> (P, T)."""
    query, key = (layer.head_to_batch_dim(part) for part in (layer.to_q(hidden), layer.to_k(states)))
    bias = layer.prepare_attention_mask(mask, states.shape[1], 1)
    return layer.get_attention_scores(query, key, bias).float().mean(0)


def per_word(found: Tensor, words: Sequence[Word]) -> Tensor:
    """Attention to tokens (P, T) -> to words (U, P): the sum over a word's tokens."""
    rows = [found[:, list(word.tokens)].sum(1) for word in words]
    return torch.stack(rows) if rows else found.new_zeros(0, len(found))


def lean(looked: Tensor, weights: Tensor) -> Tensor:
    """Mean weight in each word's area minus that elsewhere: looked (U, P), weights (N, P) -> (U, N).

    0 where a word is looked at alike from everywhere, or the map has too few places.
    """
    places = looked.shape[1]
    count = places // AREA
    if not count:
        return looked.new_zeros(len(looked), len(weights))
    inside = torch.zeros_like(looked).scatter_(1, looked.topk(count, dim=1).indices, 1.0)  # (U, P)
    apart = inside @ weights.T / count - (1 - inside) @ weights.T / (places - count)
    flat = looked.amax(1) - looked.amin(1) <= 1e-6 * looked.amax(1)
    return torch.where(flat[:, None], torch.zeros_like(apart), apart)
