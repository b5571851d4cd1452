"""One image, made once, with everything that was to be seen on the way."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.baselines.sampler import in_frame
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.schedule import Schedule, clean_of
from afa.denoiser.switches import adjust_weights, watch_weights
from afa.ensemble import Ensemble
from afa.explanation.attention import Attention, Listener
from afa.explanation.words import Word, find_words
from afa.generation.sample import Request, Sampling, sample
from afa.latents import latents_of

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
        self.claims: dict[int, tuple[dict[str, Any], Tensor]] = {}  # by pass: its call, and what guidance made of it

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
        if self.denoiser.aside:
            return
        call = arguments(self.denoiser, args, kwargs)
        self.timesteps.append(float(torch.as_tensor(self.denoiser.call.counted(call["timestep"])).flatten()[0]))
        self.calls.append(with_prompt(call, len(self.denoiser.call.latents(call))))

    def _adjust(self, stage: str, weights: Tensor) -> Tensor:
        """Changes nothing; here the rows of every expert's own blend are to be seen."""
        self.rows.setdefault((self.denoiser.aside, stage), []).append(weights.float().mean((2, 3)).cpu())
        return weights

    def _observe(self, stage: str, weights: Tensor) -> None:
        if self.denoiser.aside:
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


def _draw(pipeline: Any, denoiser: EnsembleDenoiser, claims: Mapping[int, tuple[dict[str, Any], Tensor]]) -> Iterator[tuple[int, Image8]]:
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
            yield passes[place], ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def _time(denoiser: EnsembleDenoiser, call: Mapping[str, Any]) -> float:
    return float(torch.as_tensor(denoiser.call.counted(call["timestep"])).flatten()[0])
