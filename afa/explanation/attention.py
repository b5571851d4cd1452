"""The words of a prompt, and the attention of aggregators to them while an image is sampled.

Attention shows where an aggregator looks, not that a word causes the weights; see causes.py for that.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.experts.expert import tokenizers_in
from afa.models.registry import interface_of
from afa.prompts import reader_of

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    text:   as written; the second "a" of a prompt is "a (2)"
    span:   first and last + 1 index of its characters in the prompt
    tokens: its indices in the text states; empty if it was truncated or the tokenizer gives no offsets
    """

    text: str
    span: tuple[int, int]
    tokens: tuple[int, ...]

    def left_out(self, prompt: str) -> str:
        """Return the prompt without this word."""
        start, end = self.span
        return " ".join(f"{prompt[:start]} {prompt[end:]}".split())


def find_words(pipeline: Any, prompt: str, length: int) -> list[Word]:
    """Find the words of a prompt, in order, and their tokens.

    length: number of tokens in the text states that the aggregators read
    Punctuation, start and end tokens, and padding are not words.
    """
    interface, config = interface_of(pipeline)
    spans = [(found.group(), found.span()) for found in WORD.finditer(prompt)]
    places: list[list[int]] = [[] for _ in spans]
    offset, tokenizers = interface.prompt_offset, tokenizers_in(pipeline.components)
    for index in interface.aggregator_tokenizers:
        if index >= len(tokenizers):  # SD 3 without T5
            continue
        tokenizer = tokenizers[index]
        read, reader = interface.as_read(config, tokenizer, prompt), reader_of(tokenizer)
        before = max(read.rfind(prompt), 0)  # characters of a chat before the prompt
        room = min(length - offset, reader.model_max_length)
        for place, (start, end) in enumerate(_offsets(reader, read, room, chat=read != prompt)):
            for own, (_, (first, last)) in zip(places, spans, strict=True):
                if start < last + before and end > first + before:
                    own.append(offset + place)
        offset += room
    labels = _numbered([text for text, _ in spans])
    return [
        Word(label, span, tuple(own)) for label, (_, span), own in zip(labels, spans, places, strict=True)
    ]


def _offsets(tokenizer: Any, text: str, room: int, chat: bool) -> list[tuple[int, int]]:
    """Return each token's span of characters in the text; (0, 0) for tokens that the tokenizer adds.

    chat: the text has all special tokens; tokenizers may pad before it
    """
    if not tokenizer.is_fast:
        return []
    options = {"add_special_tokens": False, "padding": "max_length"} if chat else {}
    encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=room, **options)
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _numbered(texts: Sequence[str]) -> list[str]:
    """Number repeated words from the second on: a, a (2), a (3)."""
    seen: Counter[str] = Counter()
    labels = []
    for text in texts:
        seen[text] += 1
        labels.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return labels


AREA = 4  # a word's area: the 1/AREA of the places with the most attention to it


@dataclass(frozen=True)
class Attention:
    """Attention of the aggregators to the U words of a prompt: means over passes, heads and layers.

    maps: stage that reads the text -> (U, h, w) attention probability of each place to the word's tokens
    lean: stage -> (U, N) an expert's mean weight in the word's area (the quarter of the places with the most
          attention to it) minus its mean weight elsewhere; from -1 to 1, sums to 0 over N
    """

    maps: dict[str, NDArray[np.float32]]
    lean: dict[str, NDArray[np.float32]]

    @property
    def looked(self) -> NDArray[np.float64]:
        """(U,) share of the attention that goes to each word, mean over stages.

        The sum is below 1: the rest goes to tokens that are not words.
        """
        return np.mean([maps.mean((1, 2), dtype=np.float64) for maps in self.maps.values()], axis=0)

    @property
    def leans(self) -> NDArray[np.float64]:
        """(U, N) lean, mean over stages."""
        return np.mean(list(self.lean.values()), axis=0, dtype=np.float64)


class AttentionRecorder:
    """Sums the attention to words while an image is sampled.

    denoiser: the ensemble's
    read:     number of tokens -> the words of the prompt
    """

    def __init__(self, denoiser: EnsembleDenoiser, read: Callable[[int], Sequence[Word]]) -> None:
        self.denoiser, self.read = denoiser, read
        self.words: Sequence[Word] | None = None
        self._layers: dict[str, list[Tensor]] = {}  # of the current pass: (U, P) for each layer
        self._maps: dict[str, Tensor] = {}
        self._lean: dict[str, Tensor] = {}
        self._passes: dict[str, int] = {}

    @property
    def reading(self) -> list[str]:
        """The names of stages whose aggregators read the text."""
        return [stage for stage in self.denoiser.fused if self.denoiser.aggregators[stage].reads]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Record inside the context."""
        with ExitStack() as stack:
            first = self.denoiser.aggregators[self.denoiser.fused[0]]
            stack.callback(first.register_forward_pre_hook(self._meet).remove)
            for stage in self.reading:
                for layer in self.denoiser.aggregators[stage].cross_attentions():
                    stack.callback(
                        layer.register_forward_pre_hook(self._hook(stage), with_kwargs=True).remove
                    )
            yield

    def _meet(self, aggregator: Any, args: tuple[Any, ...]) -> None:
        """Find the words when the first aggregator is called for the first time."""
        if self.words is None:
            self.words = self.read(args[2].shape[1])  # args: features, temb, text states (B, T, D)

    def _hook(self, stage: str) -> Callable[..., None]:
        def listen(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            if self.denoiser.in_uncond_pass:
                return
            states, mask = kwargs["encoder_hidden_states"], kwargs.get("attention_mask")
            assert self.words is not None
            rows = slice(1) if self.denoiser.interface.prompt_first else slice(-1, None)
            found = probabilities(layer, args[0][rows], states[rows], None if mask is None else mask[rows])
            self._layers.setdefault(stage, []).append(per_word(found, self.words))

        return listen

    def weighed(self, stage: str, weights: Tensor) -> None:
        """Add the attention of a stage, and the lean of its weights (N, h, w), to the sums."""
        layers = self._layers.pop(stage, [])
        if not layers or not self.words:
            return
        looked = torch.stack(layers).mean(0)  # (U, P)
        for sums, found in (
            (self._maps, looked.unflatten(1, weights.shape[1:])),
            (self._lean, lean(looked, weights.flatten(1))),
        ):
            sums[stage] = sums[stage] + found.cpu() if stage in sums else found.cpu()
        self._passes[stage] = self._passes.get(stage, 0) + 1

    def result(self) -> Attention | None:
        """Return the means; None if no aggregator read the text, or there was no word."""
        if not self._maps:
            return None
        maps, leans = (
            {stage: (total / self._passes[stage]).numpy() for stage, total in sums.items()}
            for sums in (self._maps, self._lean)
        )
        return Attention(maps, leans)


def probabilities(layer: Any, hidden: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax(Q·Kᵀ) of a diffusers `Attention` layer, mean over heads.

    hidden: (1, P, C) input of the queries
    states: (1, T, D) text states
    mask:   attention mask of the text, or None
    Returns (P, T).
    """
    query, key = (layer.head_to_batch_dim(part) for part in (layer.to_q(hidden), layer.to_k(states)))
    bias = layer.prepare_attention_mask(mask, states.shape[1], 1)
    return layer.get_attention_scores(query, key, bias).float().mean(0)


def per_word(found: Tensor, words: Sequence[Word]) -> Tensor:
    """Sum attention to tokens (P, T) over the tokens of each word; returns (U, P)."""
    rows = [found[:, list(word.tokens)].sum(1) for word in words]
    return torch.stack(rows) if rows else found.new_zeros(0, len(found))


def lean(looked: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean weight in each word's area minus the mean weight elsewhere.

    looked:  (U, P) attention to words
    weights: (N, P)
    Returns (U, N); 0 where attention to a word is constant, or the map has fewer than AREA places.
    """
    places = looked.shape[1]
    count = places // AREA
    if not count:
        return looked.new_zeros(len(looked), len(weights))
    inside = torch.zeros_like(looked).scatter_(1, looked.topk(count, dim=1).indices, 1.0)  # (U, P)
    apart = inside @ weights.T / count - (1 - inside) @ weights.T / (places - count)
    flat = looked.amax(1) - looked.amin(1) <= 1e-6 * looked.amax(1)
    return torch.where(flat[:, None], torch.zeros_like(apart), apart)
