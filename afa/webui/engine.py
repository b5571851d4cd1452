"""The work behind the page, without Gradio: all methods start from the same noise, one run at a time."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from afa.checkpoint.manifest import AGGREGATORS
from afa.denoiser.hooks import WeightMaps, record_weights, scale_weights
from afa.denoiser.schedule import FLOW, kind_of
from afa.devices import choose_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.names import known_methods
from afa.files import sha256
from afa.generation.prompt_loras import PromptLoras, loras_in
from afa.generation.sources import LENT, is_saved, load_sources, source_files, used_files
from afa.images import save_picture
from afa.places import public_place
from afa.prompt_syntax import A1111, check_syntax
from afa.sampling.options import MethodOptions
from afa.sampling.parameters import parameters
from afa.sampling.regions import as_strengths
from afa.sampling.registry import SAMPLING_METHODS, make_options, make_sampler
from afa.sampling.sample import PipelineSampler, Request, Sampling, in_frame
from afa.sampling.weighted_prompts import require_weights
from afa.schedulers import FLOWS, SCHEDULERS, reschedule
from afa.seeds import nth_seed
from afa.webui.gallery import Gallery, RecordedWeights, WeightMapCache
from afa.webui.preview import previewed
from afa.webui.queue import Cancelled, DrawingJob, GalleryPicture, MethodColumn, RunQueue, unexpected
from afa.webui.request_validation import Limits, RunRequest, validate_request
from afa.webui.settings import UiSettings


@dataclass(frozen=True)
class PageMethod:
    """A method of the page.

    name:     in requests
    title:    on the page
    about:    one sentence of help
    make:     returns a sampler of the loaded experts with their present scheduler
    record:   the metadata of its pictures, as `afa generate` writes them
    has_maps: whether it weights the experts, so that there are weight maps
    scalable: whether strengths of experts scale these weights
    own_loop: whether it has its own sampling loop and takes no other scheduler
    options:  the dataclass of its options; None if it has none
    """

    name: str
    title: str
    about: str
    make: Callable[[], Any]
    record: Mapping[str, Any]
    has_maps: bool = False
    scalable: bool = False
    own_loop: bool = False
    options: type[MethodOptions] | None = None

    def made(self, metadata: Mapping[str, Any]) -> bool:
        """Return whether a picture with these metadata was made by this method, with whatever options."""
        free = ("method_options",) if self.options else ()
        return all(metadata.get(name) == value for name, value in self.record.items() if name not in free)

    def with_options(self, options: MethodOptions | None) -> "PageMethod":
        """Return the method with other options. None: its defaults"""
        if options is None:
            return self
        given = asdict(options)
        return replace(
            self, make=partial(self.make, **given), record={**self.record, "method_options": given}
        )


def find_methods(ensemble: Ensemble, trained: bool) -> tuple[dict[str, PageMethod], dict[str, str]]:
    """Find the methods that fit the experts.

    trained: whether the aggregators are trained
    Returns the methods by name, and title -> reason for the methods that do not fit.
    """
    offered = [*([_afa(ensemble)] if trained else []), *(_alone(ensemble, name) for name in ensemble.names)]
    refused: dict[str, str] = {}
    for name in (name for name, method in SAMPLING_METHODS.items() if not method.each):
        method = _combined(ensemble, name)
        try:
            method.make()  # costs no memory: the experts are there
            offered.append(method)
        except UserError as error:
            refused[method.title] = str(error)
    offered += [_own(ensemble, name) for name in ensemble.names]
    return {method.name: method for method in offered}, refused


def _afa(ensemble: Ensemble) -> PageMethod:
    several = len(ensemble.names) > 1
    record = {"method": None, "method_options": None, "expert": None}

    def make() -> PipelineSampler:
        return PipelineSampler(in_frame(ensemble, ensemble.denoiser))

    return PageMethod("afa", "AFA", known_methods()["afa"], make, record, has_maps=several, scalable=several)


def _alone(ensemble: Ensemble, name: str) -> PageMethod:
    record = {"method": None, "method_options": None, "expert": name}
    make = partial(make_sampler, "single_in_ensemble", ensemble, expert=name)
    about = "one expert in the ensemble's frame (its VAE, tokenizer and scheduler)"
    return PageMethod(f"expert:{name}", f"{name} alone", about, make, record)


def _own(ensemble: Ensemble, name: str) -> PageMethod:
    record = {"method": "single", "method_options": {"expert": name}, "expert": name}
    make = partial(make_sampler, "single", ensemble, expert=name)
    return PageMethod(
        f"single:{name}", f"{name} alone, own pipeline", "one expert as its own pipeline", make, record
    )


def _combined(ensemble: Ensemble, name: str) -> PageMethod:
    kind, make = SAMPLING_METHODS[name], partial(make_sampler, name, ensemble)
    record = {"method": name, "method_options": asdict(make_options(name, {})), "expert": None}
    title = kind.title[0].upper() + kind.title[1:]
    has_maps = kind.has_maps and len(ensemble.names) > 1
    scalable = has_maps and not kind.only_predictions
    options = kind.options if fields(kind.options) else None
    return PageMethod(name, title, kind.row, make, record, has_maps, scalable, kind.own_loop, options)


LATENTS = 128  # side of latents if a model does not define it: 1,024 pixels, as for FLUX.1 and Qwen-Image


@dataclass
class Engine:
    """The loaded experts, the methods that fit them, the gallery, and the weight maps of the latest pictures.

    ensemble:    on the device
    sources:     places of the experts or of the ensemble, as given
    dtype:       of the models
    gallery:     folder of the pictures
    limits:      of requests
    methods:     by name
    refused:     title -> reason, for the methods that do not fit these experts
    aggregators: sha256 of their file; None if they are not trained
    files:       source -> hashes of its files
    queue:       of runs
    lora_dir:    folder of the LoRAs that prompts may name
    """

    ensemble: Ensemble
    sources: list[str]
    dtype: str
    gallery: Gallery
    limits: Limits
    methods: dict[str, PageMethod]
    refused: dict[str, str]
    aggregators: str | None
    files: dict[str, str]
    queue: RunQueue
    lora_dir: str | None = None

    def __post_init__(self) -> None:
        self.shelf = WeightMapCache()

    @classmethod
    def open(cls, settings: UiSettings, sources: list[str]) -> "Engine":
        """Load the experts and open the gallery. Raises UserError if one of them is not possible."""
        device = choose_device(settings.device)  # before minutes are spent on loading
        if settings.lora_dir is not None:
            loras_in(settings.lora_dir)
        gallery = Gallery.at(Path(settings.output))
        names = (*LENT, "experts", "config", "prediction_type", "dtype")
        given: dict[str, Any] = {name: getattr(settings, name) for name in names}
        lent = {name: getattr(settings, name) for name in LENT}
        files = source_files(sources, experts=settings.experts, config=settings.config, **lent)
        ensemble = load_sources(sources, **given, placement="out").to(device)
        if settings.lora_dir is not None:
            require_weights(ensemble.denoiser.interface)
        trained = is_saved(sources[0])
        methods, refused = find_methods(ensemble, trained)
        aggregators = sha256(Path(sources[0]) / AGGREGATORS) if trained else None
        limits, queue = _limits(settings, ensemble), RunQueue(settings.queue)
        return cls(
            ensemble,
            sources,
            settings.dtype,
            gallery,
            limits,
            methods,
            refused,
            aggregators,
            files,
            queue,
            settings.lora_dir,
        )

    @property
    def schedulers(self) -> list[str]:
        """The names of the schedulers that fit the experts."""
        return list(FLOWS if kind_of(self.ensemble.frame.scheduler) == FLOW else SCHEDULERS)

    @property
    def loras(self) -> list[str]:
        """The names of the LoRAs that prompts may name."""
        return [] if self.lora_dir is None else list(loras_in(self.lora_dir))

    @property
    def guidance(self) -> float | None:
        """The default strength of guidance."""
        return self.ensemble.denoiser.interface.default_guidance(self.ensemble.denoiser.config)

    @property
    def has_weighted_prompts(self) -> bool:
        """Whether the experts take weights of words in prompts."""
        return self.ensemble.denoiser.interface.weighted_prompts

    @property
    def has_true_guidance(self) -> bool:
        """Whether the experts take classifier-free guidance beside their built-in guidance."""
        try:
            self.ensemble.denoiser.interface.pipeline_guidance(
                self.ensemble.denoiser.config, 1, None, None, 2.0
            )
        except UserError:
            return False
        return True

    def job(self, given: Mapping[str, Any]) -> DrawingJob:
        """Validate a request and return its job. Raises UserError."""
        request = validate_request(
            given,
            self.limits,
            list(self.methods),
            self.ensemble.names,
            self.schedulers,
            [method.name for method in self.methods.values() if method.options],
        )
        as_strengths(request.regions, request.steps, self.ensemble.names)
        scalable = [method for method in self.methods.values() if method.scalable]
        if request.regions and not any(method.name in request.methods for method in scalable):
            titles = " or ".join(method.title for method in scalable) or "a method with aggregators"
            raise UserError(f"regions act in {titles}, which is not chosen; choose it, or remove the regions")
        interface, config = self.ensemble.denoiser.interface, self.ensemble.denoiser.config
        interface.pipeline_guidance(
            config, 1, request.guidance, request.negative_prompt, request.true_guidance
        )
        loras = PromptLoras(None, [])
        if request.prompt_syntax == A1111:
            require_weights(interface)
            loras = PromptLoras(self.lora_dir, [request.prompt])
            check_syntax([loras.texts[request.prompt]])
            check_syntax([request.negative_prompt or ""], "negative prompt")
        return DrawingJob(
            request,
            [MethodColumn(name, self.methods[name].title) for name in request.methods],
            dict(request.strengths),
            loras,
        )

    def run(self, job: DrawingJob) -> None:
        """Wait for the device and make the pictures of every column.

        An error of one method ends only its own column. The experts are unchanged afterwards.
        Raises UserError if the queue is full.
        """
        try:
            with self.queue.turn(job):
                job.check()
                job.state = "running"
                self._fill_all(job)
                job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except UserError:
            job.state = "refused"
            raise

    def _fill_all(self, job: DrawingJob) -> None:
        try:
            with job.loras.loaded(self.ensemble, job.request.prompt):
                for column in job.columns:
                    self._fill(job, column)
        except Cancelled:
            raise
        except Exception as error:  # a LoRA that does not fit; without it, no method draws what is asked for
            reason = str(error) if isinstance(error, UserError) else unexpected(error)
            for column in job.columns:
                column.error, column.done = reason, True

    def _fill(self, job: DrawingJob, column: MethodColumn) -> None:
        method = self.methods[column.method].with_options(job.request.method_options.get(column.method))
        try:
            with _rescheduled(self.ensemble, method, job.request.scheduler):
                sampler = method.make()
                for seed in (nth_seed(job.request.seed, index) for index in range(job.request.images)):
                    job.at, job.preview = (0, job.request.steps), None
                    column.pictures.append(self._picture(job, column, method, sampler, seed))
        except UserError as error:
            column.error = str(error)
        except Cancelled:
            raise
        except Exception as error:  # most likely out of memory; the other methods may still work
            column.error = unexpected(error)
        column.done = True

    def _picture(
        self, job: DrawingJob, column: MethodColumn, method: PageMethod, sampler: Any, seed: int
    ) -> GalleryPicture:
        job.check()
        metadata = self._metadata(job, method, sampler, seed)
        path = self.gallery.path(method.name, metadata)
        if self.gallery.made(path, metadata) and (not method.has_maps or path.name in self.shelf):
            return GalleryPicture(path, seed, metadata, kept=True)
        began = time.monotonic()
        text = job.loras.texts.get(job.request.prompt, job.request.prompt)
        changes: list[list[Any]] = []
        began_with = metadata["strengths"] or dict.fromkeys(self.ensemble.names, 1.0)

        def on_step(done: int, steps: int) -> None:
            job.on_step(done, steps)
            if method.scalable and job.strengths != (changes[-1][1] if changes else began_with):
                changes.append([done, dict(job.strengths)])

        with self._watched(job, method, sampler) as maps:
            image = sampler([Request(text, seed)], _sampling(job.request, self.guidance), on_step)[0]
        if changes:  # of strengths, after which step; such a picture cannot be made again from its metadata
            metadata |= {"strength_changes": changes}
            path = self.gallery.path(method.name, metadata)
        save_picture(path, image, metadata, parameters(metadata, image.shape[1], image.shape[0]))
        if maps is not None:
            self.shelf.put(path.name, RecordedWeights.of(image, maps))
        column.seconds += time.monotonic() - began
        return GalleryPicture(path, seed, metadata, kept=False)

    @contextlib.contextmanager
    def _watched(self, job: DrawingJob, method: PageMethod, sampler: Any) -> Iterator[WeightMaps | None]:
        """Record and scale the weights inside the context, as far as the method allows it."""
        with contextlib.ExitStack() as stack:
            pipeline = getattr(sampler, "pipeline", None)
            sampling = _sampling(job.request, self.guidance)
            stack.enter_context(previewed(pipeline, sampling, job.show))
            if method.scalable:
                regions = as_strengths(job.request.regions, job.request.steps, self.ensemble.names)
                stack.enter_context(
                    scale_weights(sampler.denoiser, job.strengths, regions, sampler.pipeline.scheduler)
                )
            yield stack.enter_context(record_weights(sampler.denoiser)) if method.has_maps else None

    def _metadata(self, job: DrawingJob, method: PageMethod, sampler: Any, seed: int) -> dict[str, Any]:
        """Return the metadata of a picture, with the fields of `afa generate`."""
        request = job.request
        used = getattr(sampler, "pipeline", self.ensemble.frame).scheduler
        loras = job.loras.files(request.prompt) if job.loras.chosen else {}
        return {
            "guidance_interval": None,
            **_sampling(request, self.guidance).record(),
            "scheduler": type(used).__name__ if request.scheduler is None else request.scheduler,
            "source": public_place(self.sources[0] if len(self.sources) == 1 else self.sources),
            **method.record,
            "experts": list(self.ensemble.names),
            "aggregators": self.aggregators if method.record["method"] is None else None,
            "files": used_files(self.files, method.record["method"] is None) | loras,
            "dtype": self.dtype,
            "prompt": request.prompt,
            "seed": seed,
            "strengths": dict(job.strengths)
            if method.scalable and set(job.strengths.values()) != {1.0}
            else None,
            "regions": [region.record() for region in request.regions] or None if method.scalable else None,
        }


def _sampling(request: RunRequest, guidance: float | None) -> Sampling:
    strength = guidance if request.guidance is None else request.guidance
    return Sampling(
        request.steps,
        strength,
        request.negative_prompt,
        request.height,
        request.width,
        request.true_guidance,
        prompt_syntax=request.prompt_syntax,
    )


@contextlib.contextmanager
def _rescheduled(ensemble: Ensemble, method: PageMethod, name: str | None) -> Iterator[None]:
    """Replace the scheduler inside the context. Raises UserError for a method with its own sampling loop."""
    if name is not None and method.own_loop:
        raise UserError(
            f"{method.title} makes its steps itself; choose the experts' own scheduler for it, not {name}"
        )
    before = [(part, part.scheduler) for part in (ensemble.frame, *ensemble.experts)]
    try:
        if name is not None:
            reschedule(ensemble, name)
        yield
    finally:
        for part, scheduler in before:
            part.scheduler = scheduler


def _limits(settings: UiSettings, ensemble: Ensemble) -> Limits:
    factor, interface = ensemble.pipeline().vae_scale_factor, ensemble.denoiser.interface
    side = interface.sample_size(ensemble.denoiser.config) or LATENTS
    own = factor * max(side if isinstance(side, (tuple, list)) else (side,))
    return Limits(
        settings.max_images, settings.max_steps, settings.max_side or 2 * own, factor * interface.patch, own
    )
