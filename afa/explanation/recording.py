"""Record one image while it is sampled: weight maps, attention of the aggregators to words, predicted images.

Attention shows where an aggregator looks, not that a word causes the weights; see causes.py for that.
"""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import adjust_weights, watch_weights
from afa.denoiser.schedule import Schedule, clean_of
from afa.ensemble import Ensemble
from afa.experts.expert import TOKENIZERS
from afa.latents import latents_of
from afa.models.registry import called
from afa.sampling.sample import Request, Sampling, in_frame, sample

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
    call, _ = called(pipeline)
    spans = [(found.group(), found.span()) for found in WORD.finditer(prompt)]
    places: list[list[int]] = [[] for _ in spans]
    offset = 0
    for index in call.read:
        tokenizer = getattr(pipeline, TOKENIZERS[index])
        room = min(length - offset, tokenizer.model_max_length)
        for place, (start, end) in enumerate(_offsets(tokenizer, prompt, room)):
            for own, (_, (first, last)) in zip(places, spans, strict=True):
                if start < last and end > first:
                    own.append(offset + place)
        offset += room
    labels = _numbered([text for text, _ in spans])
    return [
        Word(label, span, tuple(own)) for label, (_, span), own in zip(labels, spans, places, strict=True)
    ]


def _offsets(tokenizer: Any, prompt: str, room: int) -> list[tuple[int, int]]:
    """Return each token's span of characters in the prompt; (0, 0) for tokens that the tokenizer adds."""
    if not tokenizer.is_fast:
        return []
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=room)
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
            found = probabilities(layer, args[0][-1:], states[-1:], None if mask is None else mask[-1:])
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


Image8 = NDArray[np.uint8]
FRAMES = 24  # the largest number of steps whose predicted images are decoded


@dataclass(frozen=True)
class Recording:
    """The record of one sampled image; weights are those of the conditional pass.

    experts:   names (N)
    prompt:    its text
    image:     (H, W, 3) uint8
    timesteps: one a pass
    maps:      fused stage -> (passes, N, h, w) float16, sum 1 over N
    most:      (passes, K stages, N) mean weight over places: the largest of the conditional and unconditional
               pass, and of all blends where each expert has its own
    rows:      (True for a separate unconditional pass, stage) -> mean weights of all rows (passes, R, N)
    calls:     arguments of the denoiser at every pass, the conditional part only
    words:     of the prompt
    attention: of aggregators that read the text; None if no aggregator does
    drawn:     pass -> the clean image that the ensemble predicted there (H, W, 3) uint8; passes with a
               non-finite image are left out

    Memory: SD 1.5 at 512 px with 50 steps and 3 experts has 11 MB of maps, 11 MB of attention, 4 MB of calls.
    """

    experts: tuple[str, ...]
    prompt: str
    image: Image8
    timesteps: tuple[float, ...]
    maps: dict[str, Tensor]
    most: NDArray[np.float32]
    rows: dict[tuple[bool, str], Tensor] = field(repr=False)
    calls: list[dict[str, Any]] = field(repr=False)
    words: tuple[Word, ...]
    attention: Attention | None
    drawn: dict[int, Image8] = field(repr=False)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the fused stages, in order."""
        return tuple(self.maps)

    @functools.cached_property
    def means(self) -> NDArray[np.float32]:
        """(passes, K, N) mean weights over places."""
        return torch.stack([maps.float().mean((2, 3)) for maps in self.maps.values()], dim=1).numpy()


def record(ensemble: Ensemble, request: Request, sampling: Sampling, pipeline: Any = None) -> Recording:
    """Generate one image and record the weights of its aggregators.

    ensemble: of at least two experts
    request:  prompt and seed
    sampling: steps and guidance
    pipeline: of the ensemble; None: a new one
    Returns a Recording. Recording changes nothing: the image is, bit for bit, that of `afa generate`.
    """
    pipeline = pipeline or in_frame(ensemble, ensemble.denoiser)
    recorder = Recorder(ensemble.denoiser, lambda length: find_words(pipeline, request.prompt, length))
    with recorder.open(pipeline), torch.no_grad():
        image = sample(pipeline, [request], sampling)[0]
    drawn = dict(_draw(pipeline, ensemble.denoiser, recorder.predictions))
    return Recording(
        ensemble.names,
        request.prompt,
        image,
        tuple(recorder.timesteps),
        {stage: torch.stack(maps) for stage, maps in recorder.maps.items()},
        _most(recorder),
        {key: torch.stack(passes) for key, passes in recorder.rows.items()},
        recorder.calls,
        tuple(recorder.attention.words or ()),
        recorder.attention.result(),
        drawn,
    )


class Recorder:
    """Hooks that record one image while it is sampled.

    denoiser: the ensemble's
    read:     number of tokens -> the words of the prompt
    """

    def __init__(self, denoiser: EnsembleDenoiser, read: Any) -> None:
        self.denoiser = denoiser
        self.attention = AttentionRecorder(denoiser, read)
        self.timesteps: list[float] = []
        self.maps: dict[str, list[Tensor]] = {stage: [] for stage in denoiser.fused}
        self.rows: dict[tuple[bool, str], list[Tensor]] = {}
        self.calls: list[dict[str, Any]] = []
        # pass -> its call, and the guided prediction
        self.predictions: dict[int, tuple[dict[str, Any], Tensor]] = {}

    @contextmanager
    def open(self, pipeline: Any) -> Iterator[None]:
        """Record inside the context."""
        with ExitStack() as stack:
            stack.callback(self.denoiser.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            stack.enter_context(adjust_weights(self.denoiser, self._adjust))
            stack.enter_context(watch_weights(self.denoiser, self._observe))
            stack.enter_context(self.attention.open())
            stack.enter_context(_stepping(pipeline.scheduler, self._step))
            yield

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the conditional part of the call when a pass begins."""
        if self.denoiser.in_uncond_pass:
            return
        call = arguments(self.denoiser, args, kwargs)
        self.timesteps.append(
            float(torch.as_tensor(self.denoiser.call.timestep_from_model(call["timestep"])).flatten()[0])
        )
        self.calls.append(with_prompt(call, len(self.denoiser.call.latents(call))))

    def _adjust(self, stage: str, weights: Tensor) -> Tensor:
        """Record the rows of every blend, and return the weights unchanged."""
        self.rows.setdefault((self.denoiser.in_uncond_pass, stage), []).append(
            weights.float().mean((2, 3)).cpu()
        )
        return weights

    def _observe(self, stage: str, weights: Tensor) -> None:
        if self.denoiser.in_uncond_pass:
            return
        self.maps[stage].append(weights[-1].half().cpu())
        self.attention.weighed(stage, weights[-1].float())  # the last sample is the conditional one

    def _step(self, prediction: Tensor) -> None:
        """Keep the guided prediction that the scheduler receives."""
        self.predictions[len(self.calls) - 1] = (self.calls[-1], prediction.detach())


def _most(recorder: Recorder) -> NDArray[np.float32]:
    """Return (passes, K, N): the largest mean weight over all rows, and over both passes of guidance."""
    halves = [
        torch.stack([torch.stack(recorder.rows[aside, stage]).amax(1) for stage in recorder.maps], dim=1)
        for aside in sorted({aside for aside, _ in recorder.rows})
    ]
    most: NDArray[np.float32] = torch.stack(halves).amax(0).numpy()
    return most


def arguments(denoiser: EnsembleDenoiser, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of the denoiser by name."""
    return dict(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments)


def with_prompt(value: Any, batch: int) -> Any:
    """Return the conditional part of a call: the last sample of every tensor with a batch dimension.

    Pipelines put the unconditional samples before the conditional ones.
    """
    if isinstance(value, dict):
        return {name: with_prompt(part, batch) for name, part in value.items()}
    if isinstance(value, Tensor) and batch > 1 and value.ndim and len(value) == batch:
        return value[-1:].clone()
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _stepping(scheduler: Any, on_step: Any) -> Iterator[None]:
    """Call on_step with the prediction that the scheduler receives at every step."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its arguments
    def watched(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        on_step(prediction)
        return step(prediction, *args, **kwargs)

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def _draw(
    pipeline: Any, denoiser: EnsembleDenoiser, predictions: Mapping[int, tuple[dict[str, Any], Tensor]]
) -> Iterator[tuple[int, Image8]]:
    """Decode the predicted clean images of up to FRAMES passes, spread evenly; the last pass is included."""
    latents, schedule = latents_of(pipeline.vae), Schedule.of(pipeline.scheduler)
    passes = sorted(predictions)
    for place in np.unique(np.linspace(0, len(passes) - 1, min(FRAMES, len(passes))).round().astype(int)):
        call, prediction = predictions[passes[place]]
        noisy = denoiser.call.latents(call).float()
        signal, noise = (float(level) for level in schedule.at(torch.tensor(_time(denoiser, call))))
        answer = denoiser.call.prediction(prediction, (noisy.shape[-2], noisy.shape[-1])).float()
        clean = clean_of(schedule.kind, answer, noisy, max(signal, 1e-4), noise)
        with torch.no_grad():
            pixels = latents.draw(pipeline.vae, latents.unscaled(clean).to(pipeline.vae.dtype))[0].float()
        if pixels.isfinite().all():  # some VAEs overflow in half precision
            yield (
                passes[place],
                ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy(),
            )


def _time(denoiser: EnsembleDenoiser, call: Mapping[str, Any]) -> float:
    return float(torch.as_tensor(denoiser.call.timestep_from_model(call["timestep"])).flatten()[0])
