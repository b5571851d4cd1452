"""Record one image while it is sampled: weight maps, attention to words, predicted images, calls."""

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

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import adjust_weights, watch_weights
from afa.denoiser.schedule import Schedule, clean_of
from afa.ensemble import Ensemble
from afa.explanation.attention import Attention, AttentionRecorder, Word, find_words
from afa.latents import latents_of
from afa.sampling.sample import Request, Sampling, in_frame, sample

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
    most = [  # of each pass of guidance, (passes, K, N): the largest mean weight over all rows
        torch.stack([torch.stack(recorder.rows[aside, stage]).amax(1) for stage in recorder.maps], dim=1)
        for aside in sorted({aside for aside, _ in recorder.rows})
    ]
    return Recording(
        ensemble.names,
        request.prompt,
        image,
        tuple(recorder.timesteps),
        {stage: torch.stack(maps) for stage, maps in recorder.maps.items()},
        torch.stack(most).amax(0).numpy(),
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
        self.timesteps.append(_time(self.denoiser, call))
        interface = self.denoiser.interface
        self.calls.append(with_prompt(call, len(interface.latents(call)), interface.prompt_first))

    def _adjust(self, stage: str, weights: Tensor) -> Tensor:
        """Record the rows of every blend, and return the weights unchanged."""
        self.rows.setdefault((self.denoiser.in_uncond_pass, stage), []).append(
            weights.float().mean((2, 3)).cpu()
        )
        return weights

    def _observe(self, stage: str, weights: Tensor) -> None:
        if self.denoiser.in_uncond_pass:
            return
        prompted = weights[0 if self.denoiser.interface.prompt_first else -1]
        self.maps[stage].append(prompted.half().cpu())
        self.attention.weighed(stage, prompted.float())

    def _step(self, prediction: Tensor) -> None:
        """Keep the guided prediction that the scheduler receives."""
        self.predictions[len(self.calls) - 1] = (self.calls[-1], prediction.detach())


def arguments(denoiser: EnsembleDenoiser, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of the denoiser by name."""
    return dict(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments)


def with_prompt(value: Any, batch: int, prompt_first: bool = False) -> Any:
    """Return the conditional part of a call: one sample of every tensor or list with a row for each.

    prompt_first: the conditional sample is the first one; else the last one
    """
    if isinstance(value, dict):
        return {name: with_prompt(part, batch, prompt_first) for name, part in value.items()}
    rows = slice(1) if prompt_first else slice(-1, None)
    if isinstance(value, Tensor):
        return value[rows].clone() if batch > 1 and value.ndim and len(value) == batch else value.clone()
    if isinstance(value, list) and len(value) == batch and all(isinstance(one, Tensor) for one in value):
        return [one.clone() for one in value[rows]]
    return value


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
    for place in evenly_spread(len(passes), FRAMES):
        call, prediction = predictions[passes[place]]
        noisy = denoiser.interface.latents(call).float()
        signal, noise = (float(level) for level in schedule.at(torch.tensor(_time(denoiser, call))))
        size = (noisy.shape[-2], noisy.shape[-1])
        answer = denoiser.interface.stepped_to_latents(prediction, size).float()
        clean = clean_of(schedule.kind, answer, noisy, max(signal, 1e-4), noise)
        with torch.no_grad():
            pixels = latents.draw(pipeline.vae, latents.unscaled(clean).to(pipeline.vae.dtype))[0].float()
        if pixels.isfinite().all():  # some VAEs overflow in half precision
            yield (
                passes[place],
                ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy(),
            )


def evenly_spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 … count-1, evenly spread, with the first and the last."""
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(most, count)).round())]


def _time(denoiser: EnsembleDenoiser, call: Mapping[str, Any]) -> float:
    """Return the timestep of a call, as schedulers count it."""
    interface = denoiser.interface
    time = interface.timestep_from_model(call[interface.timestep_input])
    return float(torch.as_tensor(time).flatten()[0])
