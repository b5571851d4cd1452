"""Drawing by seed: an image depends on its prompt and seed only, not on its batch."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from afa.denoiser.guidance import not_shared
from afa.denoiser.schedule import FLOW, kind_of
from afa.ensemble import Ensemble
from afa.errors import UserError, unknown
from afa.experts.expert import Expert
from afa.images import over_white
from afa.models.registry import FAMILIES, denoiser_of, interface_of
from afa.prompt_syntax import A1111, PLAIN, SYNTAXES
from afa.sampling.guidance_interval import guided_within
from afa.sampling.weighted_prompts import count_chunks, require_weights, weighted_prompts
from afa.seeds import generator
from afa.settings import GUIDANCE, SAMPLING_STEPS, SEED, Interval, check_interval, check_number
from afa.text_files import check_text

UNKNOWN_SIDE = 64  # of the latents, where a model's config says nothing


@dataclass(frozen=True)
class Request:
    """One image to generate.

    prompt: its text
    seed:   of its noise, 0 to 2**64 - 1
    """

    prompt: str
    seed: int

    def __post_init__(self) -> None:
        check_number(self.seed, "seed", whole=True, **SEED)
        check_text(self.prompt, "the prompt")


@dataclass(frozen=True)
class Sampling:
    """How all images of a run are generated. None: the model's own.

    steps:           denoising steps
    guidance:        strength of guidance; 1 turns it off
    negative_prompt: what the images should not show
    height, width:   in pixels
    true_guidance:   FLUX: strength of classifier-free guidance beside the built-in one
    guidance_interval: shares of the steps, 0 to 1, between which guidance is applied; None: in all steps
    prompt_syntax:   plain, or a1111: weights of words, BREAK, long prompts in chunks
    """

    steps: int
    guidance: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    true_guidance: float | None = None
    guidance_interval: Interval | None = None
    prompt_syntax: str = PLAIN

    def __post_init__(self) -> None:
        check_number(self.steps, "steps", whole=True, **SAMPLING_STEPS)
        for name in ("guidance", "true_guidance"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name, **GUIDANCE)
        check_text(self.negative_prompt or "", "the negative prompt")
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval, "guidance interval")
        if self.prompt_syntax not in SYNTAXES:
            raise UserError(unknown(self.prompt_syntax, SYNTAXES, "prompt syntax"))

    def record(self) -> dict[str, Any]:
        """Return all options by name, for the record of an image; the last two only if they are given."""
        facts = asdict(self)
        for name, unset in (("guidance_interval", None), ("prompt_syntax", PLAIN)):
            if facts[name] == unset:
                del facts[name]
        return facts


# A way to make images from requests: (n requests, how) -> (n, H, W, 3) uint8
Sampler = Callable[[Sequence[Request], Sampling], NDArray[np.uint8]]
# Called after every denoising step with (steps done, steps in all); an exception that it raises ends the run.
OnStep = Callable[[int, int], None]


def sample(
    pipeline: Any, requests: Sequence[Request], sampling: Sampling, on_step: OnStep | None = None
) -> NDArray[np.uint8]:
    """Draw one batch of images: (n, H, W, 3) uint8.

    The noise comes from generators on the CPU, so it is the same on every device.
    Raises UserError for guidance, a negative prompt, a size or a prompt's syntax that the model cannot use.
    """
    interface, _ = interface_of(pipeline)
    _check_sides(sampling, pipeline.vae_scale_factor * interface.patch)
    _check_steps(sampling, pipeline.scheduler)
    if sampling.prompt_syntax == A1111:
        require_weights(interface)
        counts = count_chunks(pipeline, [request.prompt for request in requests])
        if len(set(counts)) > 1:  # the chunks that fill up a shorter prompt would change its image
            return _by_chunks(pipeline, requests, counts, sampling, on_step)
    with _step_callback(on_step) as callback, _as_guided(pipeline, sampling):
        result = pipeline(
            **_asked(pipeline, requests, sampling),
            num_inference_steps=sampling.steps,
            **{name: side for name in ("height", "width") if (side := getattr(sampling, name)) is not None},
            generator=[generator(request.seed) for request in requests],
            output_type="np",
            callback_on_step_end=callback,
        )
    images: NDArray[np.uint8] = (over_white(result.images) * 255).round().astype(np.uint8)
    return images


def _asked(pipeline: Any, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
    """Return the pipeline's arguments for prompts and guidance."""
    interface, config = interface_of(pipeline)
    prompts = [request.prompt for request in requests]
    guidance = interface.pipeline_guidance(
        config, len(prompts), sampling.guidance, sampling.negative_prompt, sampling.true_guidance
    )
    if sampling.prompt_syntax == PLAIN:
        return {"prompt": prompts, **guidance}  # the prompt is not the first argument everywhere
    negatives, guided = guidance.pop("negative_prompt"), (strength(pipeline, sampling) or 0) > 1
    return guidance | weighted_prompts(pipeline, prompts, negatives, guided=guided)


def _by_chunks(
    pipeline: Any,
    requests: Sequence[Request],
    counts: Sequence[int],
    sampling: Sampling,
    on_step: OnStep | None,
) -> NDArray[np.uint8]:
    """Draw images whose prompts have different numbers of chunks, each number by itself."""
    images: dict[int, NDArray[np.uint8]] = {}
    for count in sorted(set(counts)):
        own = [index for index, other in enumerate(counts) if other == count]
        drawn = sample(pipeline, [requests[index] for index in own], sampling, on_step)
        images |= dict(zip(own, drawn, strict=True))
    return np.stack([images[index] for index in range(len(requests))])


@contextmanager
def _as_guided(pipeline: Any, sampling: Sampling) -> Iterator[None]:
    """Apply guidance where it is asked for. Without it, two images of one seed are no pair of predictions."""
    unguided = (strength(pipeline, sampling) or 0) <= 1
    single = not_shared(denoiser_of(pipeline)) if unguided else nullcontext()
    with single, guided_within(pipeline, None if unguided else sampling.guidance_interval):
        yield


@contextmanager
def _step_callback(on_step: OnStep | None) -> Iterator[Any]:
    """Yield the callback that a diffusers pipeline calls after every step; None if there is nothing to do.

    It calls on_step, or else moves a progress bar if stderr is a terminal.
    """
    if on_step is None and not sys.stderr.isatty():
        yield None
        return
    with tqdm(desc="steps", unit="step", leave=False, file=sys.stderr, disable=on_step is not None) as bar:

        def callback(pipeline: Any, step: int, timestep: Any, changed: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, pipeline.num_timesteps)
            else:
                bar.total = pipeline.num_timesteps
                bar.update(step + 1 - bar.n)
            return changed

        yield callback


def image_size(pipeline: Any, sampling: Sampling) -> tuple[int, int]:
    """Return height and width in pixels of a pipeline's images: those of the request, or the model's own."""
    interface, config = interface_of(pipeline)
    own = interface.sample_size(config) or UNKNOWN_SIDE
    height, width = own if isinstance(own, (tuple, list)) else (own, own)
    factor = pipeline.vae_scale_factor
    return sampling.height or height * factor, sampling.width or width * factor


def strength(pipeline: Any, sampling: Sampling) -> float | None:
    """Return the strength of guidance in a pipeline: that of the request, or its family's own."""
    interface, config = interface_of(pipeline)
    return interface.default_guidance(config) if sampling.guidance is None else sampling.guidance


def _check_sides(sampling: Sampling, unit: int) -> None:
    for name, side in (("height", sampling.height), ("width", sampling.width)):
        if side is not None and side % unit:
            raise UserError(
                f"{name} {side} must be a multiple of {unit} pixels for this model;"
                f" {max(1, round(side / unit)) * unit} is the nearest"
            )


def _check_steps(sampling: Sampling, scheduler: Any) -> None:
    """Raise UserError for more steps than the schedule has timesteps; diffusers would fail, or say nothing.

    A flow has any number of timesteps.
    """
    most = getattr(scheduler.config, "num_train_timesteps", None)
    if most is not None and kind_of(scheduler) != FLOW and sampling.steps > most:
        raise UserError(
            f"{sampling.steps} steps are more than the {most} timesteps of {type(scheduler).__name__}; give"
            f" at most {most}"
        )


def sample_all(
    pipeline: Any, requests: Sequence[Request], sampling: Sampling, batch_size: int
) -> Iterator[NDArray[np.uint8]]:
    """Draw images batch by batch, in order: each (n, H, W, 3) uint8."""
    for start in range(0, len(requests), batch_size):
        yield sample(pipeline, requests[start : start + batch_size], sampling)


@dataclass(frozen=True)
class PipelineSampler:
    """Draws images with a stock pipeline.

    guided: parts of the pipeline whose attribute `guidance` is set to the strength of guidance
    """

    pipeline: Any
    guided: tuple[Any, ...] = ()

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser; weight maps are recorded there."""
        return denoiser_of(self.pipeline)

    def __call__(
        self, requests: Sequence[Request], sampling: Sampling, on_step: OnStep | None = None
    ) -> NDArray[np.uint8]:
        """Draw one batch of images: (n, H, W, 3) uint8."""
        for part in self.guided:
            part.guidance = strength(self.pipeline, sampling)
        return sample(self.pipeline, requests, sampling, on_step)


def in_frame(ensemble: Ensemble, denoiser: nn.Module, **components: Any) -> Any:
    """Return a stock pipeline of the ensemble's frame with another denoiser, on the experts' device."""
    components[FAMILIES[ensemble.experts[0].family].component] = denoiser
    group = ensemble.denoiser.group
    here = 0 if group is None else group.own[0]  # the first expert that this process has
    return settled(ensemble.pipeline(**components), ensemble.experts[here])


def settled(pipeline: Any, expert: Expert) -> Any:
    """Move a pipeline to an expert's device, and turn off its own progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(next(expert.model.parameters()).device)


def check_guidable(ensemble: Ensemble, method: str) -> None:
    """Raises UserError for experts whose pipelines make no unconditional prediction beside the other."""
    reason = ensemble.denoiser.interface.why_no_batched_guidance(ensemble.denoiser.config)
    if reason:
        raise UserError(f"{method} needs classifier-free guidance, and {reason}; choose another method")


def find_expert(ensemble: Ensemble, name: str | None) -> int:
    """Return the index of an expert by its name; None: of the only expert. Raises UserError."""
    if name is None and len(ensemble.names) > 1:
        raise UserError(
            f"which expert? give expert=NAME (or --expert NAME), one of {', '.join(ensemble.names)}"
        )
    if name is not None and name not in ensemble.names:
        raise UserError(unknown(name, ensemble.names, "expert"))
    return 0 if name is None else ensemble.names.index(name)
