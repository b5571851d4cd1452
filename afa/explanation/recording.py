"""Recording an image as it is drawn: weights, attention of aggregators, words.

Which words the aggregators look at, and how the experts' weights lie on what they look at.

Attention says where an aggregator looks, not that the word is why the weights are as they are; for that, see causes.py.
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
    """text: as written; the second "a" of a prompt is "a (2)". span: of its letters in the prompt.

    tokens: its places in the text states; none: it was cut off, or the tokenizer does not say.
    """

    text: str
    span: tuple[int, int]
    tokens: tuple[int, ...]

    def left_out(self, prompt: str) -> str:
        """The prompt without this word."""
        start, end = self.span
        return " ".join(f"{prompt[:start]} {prompt[end:]}".split())


def find_words(pipeline: Any, prompt: str, length: int) -> list[Word]:
    """The words of a prompt, in order. length: of the text states that aggregators see.

    Punctuation, the start and the end of the text, and padding are no words.
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
    """Where in the prompt every token comes from; nowhere (0, 0) for what the tokenizer adds."""
    if not tokenizer.is_fast:
        return []
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=room)
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _numbered(texts: Sequence[str]) -> list[str]:
    """From the second time on, a word says which it is."""
    seen: Counter[str] = Counter()
    labels = []
    for text in texts:
        seen[text] += 1
        labels.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return labels


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
                    stack.callback(
                        block.attn2.register_forward_pre_hook(self._hook(stage), with_kwargs=True).remove
                    )
            yield

    def _meet(self, aggregator: Any, args: tuple[Any, ...]) -> None:
        """The text is seen for the first time."""
        if self.words is None:
            self.words = self.read(args[2].shape[1])  # features, temb, text, as run_stages calls it

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
        """A stage's weights (N, h, w) are known: add up how they lie on what was looked at."""
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

    def heard(self) -> Attention | None:
        """The means; None if nobody read, or there was no word."""
        if not self._maps:
            return None
        maps, leans = (
            {stage: (total / self._passes[stage]).numpy() for stage, total in sums.items()}
            for sums in (self._maps, self._lean)
        )
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


Image8 = NDArray[np.uint8]
FRAMES = 24  # at most so many of an image's steps are drawn


@dataclass(frozen=True)
class Recording:
    """What was recorded while one image was made; weights are those of the half with the prompt.

    experts:   names (N)
    prompt:    its text
    image:     (H, W, 3) uint8
    timesteps: one a pass
    maps:      fused stage -> (passes, N, h, w) float16, sum 1 over N
    most:      (passes, K stages, N) mean weight over places: the largest of both halves, and of all blends
               where each expert has one
    rows:      (True for a pass of guidance by itself, stage) -> mean weights of all rows (passes, R, N)
    calls:     what the denoiser was called with at every pass, without the half that has no prompt
    words:     of the prompt
    attention: of aggregators that read the text; None if none does
    drawn:     pass -> the image that the ensemble predicted there (H, W, 3) uint8; not of passes whose image
               is not finite

    Memory: SD 1.5 at 512 px with 50 steps and 3 experts has 11 MB of maps, 11 MB of attention, and 4 MB of calls.
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
        """The fused stages, in order."""
        return tuple(self.maps)

    @functools.cached_property
    def means(self) -> NDArray[np.float32]:
        """Mean weights over places: (passes, K, N)."""
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
    drawn = dict(_draw(pipeline, ensemble.denoiser, recorder.claims))
    return Recording(
        ensemble.names,
        request.prompt,
        image,
        tuple(recorder.timesteps),
        {stage: torch.stack(maps) for stage, maps in recorder.maps.items()},
        _most(recorder),
        {key: torch.stack(passes) for key, passes in recorder.rows.items()},
        recorder.calls,
        tuple(recorder.listener.words or ()),
        recorder.listener.heard(),
        drawn,
    )


class Recorder:
    """Looks on while one image is made. read: finds the words in a text of so many tokens."""

    def __init__(self, denoiser: EnsembleDenoiser, read: Any) -> None:
        self.denoiser = denoiser
        self.listener = Listener(denoiser, read)
        self.timesteps: list[float] = []
        self.maps: dict[str, list[Tensor]] = {stage: [] for stage in denoiser.fused}
        self.rows: dict[tuple[bool, str], list[Tensor]] = {}
        self.calls: list[dict[str, Any]] = []
        self.claims: dict[
            int, tuple[dict[str, Any], Tensor]
        ] = {}  # by pass: its call, and what guidance made of it

    @contextmanager
    def open(self, pipeline: Any) -> Iterator[None]:
        """Look on inside."""
        with ExitStack() as stack:
            stack.callback(self.denoiser.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            stack.enter_context(adjust_weights(self.denoiser, self._adjust))
            stack.enter_context(watch_weights(self.denoiser, self._observe))
            stack.enter_context(self.listener.open())
            stack.enter_context(_stepping(pipeline.scheduler, self._step))
            yield

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins: keep the half of its call that has the prompt."""
        if self.denoiser.in_uncond_pass:
            return
        call = arguments(self.denoiser, args, kwargs)
        self.timesteps.append(
            float(torch.as_tensor(self.denoiser.call.timestep_from_model(call["timestep"])).flatten()[0])
        )
        self.calls.append(with_prompt(call, len(self.denoiser.call.latents(call))))

    def _adjust(self, stage: str, weights: Tensor) -> Tensor:
        """Changes nothing; here the rows of every expert's own blend are to be seen."""
        self.rows.setdefault((self.denoiser.in_uncond_pass, stage), []).append(weights.float().mean((2, 3)).cpu())
        return weights

    def _observe(self, stage: str, weights: Tensor) -> None:
        if self.denoiser.in_uncond_pass:
            return
        self.maps[stage].append(weights[-1].half().cpu())
        self.listener.weighed(stage, weights[-1].float())  # the last sample is that of the prompt

    def _step(self, prediction: Tensor) -> None:
        """The scheduler is handed what guidance made of the last pass."""
        self.claims[len(self.calls) - 1] = (self.calls[-1], prediction.detach())


def _most(recorder: Recorder) -> NDArray[np.float32]:
    """(passes, K, N): over all rows, and over both passes where guidance makes a step of two."""
    halves = [
        torch.stack([torch.stack(recorder.rows[aside, stage]).amax(1) for stage in recorder.maps], dim=1)
        for aside in sorted({aside for aside, _ in recorder.rows})
    ]
    most: NDArray[np.float32] = torch.stack(halves).amax(0).numpy()
    return most


def arguments(denoiser: EnsembleDenoiser, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call of the denoiser by names."""
    return dict(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments)


def with_prompt(value: Any, batch: int) -> Any:
    """The half of a call that has the prompt: of everything that has a batch, the last; guidance puts the other before it."""
    if isinstance(value, dict):
        return {name: with_prompt(part, batch) for name, part in value.items()}
    if isinstance(value, Tensor) and batch > 1 and value.ndim and len(value) == batch:
        return value[-1:].clone()
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _stepping(scheduler: Any, told: Any) -> Iterator[None]:
    """Tell what a scheduler is handed, step by step."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its arguments
    def watched(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        told(prediction)
        return step(prediction, *args, **kwargs)

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def _draw(
    pipeline: Any, denoiser: EnsembleDenoiser, claims: Mapping[int, tuple[dict[str, Any], Tensor]]
) -> Iterator[tuple[int, Image8]]:
    """The images that were believed in at up to FRAMES passes, spread evenly, the last among them."""
    latents, schedule = latents_of(pipeline.vae), Schedule.of(pipeline.scheduler)
    passes = sorted(claims)
    for place in np.unique(np.linspace(0, len(passes) - 1, min(FRAMES, len(passes))).round().astype(int)):
        call, prediction = claims[passes[place]]
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
