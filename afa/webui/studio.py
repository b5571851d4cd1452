"""The page's work, without a page: every method from the same noise, step by step, one run at a time."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afa.checkpoint.manifest import AGGREGATORS
from afa.denoiser.hooks import WeightMaps, record_weights, scale_weights
from afa.denoiser.schedule import FLOW, kind_of
from afa.devices import choose_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.files import sha256
from afa.generation.run import is_saved, load_sources, source_files, used_files
from afa.places import public_place
from afa.sampling.sample import Request, Sampling
from afa.schedulers import FLOWS, SCHEDULERS, reschedule
from afa.seeds import nth_seed
from afa.webui.gallery import Gallery
from afa.webui.job import Cancelled, Column, Job, Picture, unexpected
from afa.webui.maps import Kept, Shelf
from afa.webui.methods import Method, find_methods
from afa.webui.order import Limits, Order, make_order
from afa.webui.settings import UiSettings
from afa.webui.turns import Turns

LATENTS = 128  # the side of latents where a model does not say: 1,024 pixels, as FLUX.1 and Qwen-Image are made for


@dataclass
class Studio:
    """The loaded experts, every method that goes with them, the gallery, and the weight maps of the latest pictures.

    sources: as given. refused: methods that do not go with these experts, and why. aggregators: their file's sha256, None if untrained.
    files: hashes of what pictures are made with, by source.
    """

    ensemble: Ensemble
    sources: list[str]
    dtype: str
    gallery: Gallery
    limits: Limits
    methods: dict[str, Method]
    refused: dict[str, str]
    aggregators: str | None
    files: dict[str, str]
    turns: Turns

    def __post_init__(self) -> None:
        self.shelf = Shelf()

    @classmethod
    def open(cls, settings: UiSettings, sources: list[str]) -> "Studio":
        """Load what was asked for. Raises UserError for what cannot be loaded, and for a gallery that cannot be one."""
        device = choose_device(settings.device)  # before minutes are spent on loading
        gallery = Gallery.at(Path(settings.output))
        names = ("experts", "frame", "config", "prediction_type", "dtype")
        given: dict[str, Any] = {name: getattr(settings, name) for name in names}
        files = source_files(sources, experts=settings.experts, frame=settings.frame, config=settings.config)
        ensemble = load_sources(sources, **given, placement="out").to(device)
        trained = is_saved(sources[0])
        methods, refused = find_methods(ensemble, trained)
        aggregators = sha256(Path(sources[0]) / AGGREGATORS) if trained else None
        limits, turns = _limits(settings, ensemble), Turns(settings.queue)
        return cls(ensemble, sources, settings.dtype, gallery, limits, methods, refused, aggregators, files, turns)

    @property
    def schedulers(self) -> list[str]:
        """Names of those that fit these experts."""
        return list(FLOWS if kind_of(self.ensemble.frame.scheduler) == FLOW else SCHEDULERS)

    @property
    def guidance(self) -> float | None:
        """Its strength where nobody says."""
        return self.ensemble.denoiser.call.strength(self.ensemble.denoiser.config)

    @property
    def has_true_guidance(self) -> bool:
        """Whether these experts take classifier-free guidance beside their own."""
        try:
            self.ensemble.denoiser.call.guided(self.ensemble.denoiser.config, 1, None, None, 2.0)
        except UserError:
            return False
        return True

    def job(self, given: Mapping[str, Any]) -> Job:
        """A run as asked for. Raises UserError for what it may not ask for."""
        order = make_order(given, self.limits, list(self.methods), self.ensemble.names, self.schedulers)
        call, config = self.ensemble.denoiser.call, self.ensemble.denoiser.config
        call.guided(config, 1, order.guidance, order.negative_prompt, order.true_guidance)
        return Job(order, [Column(name, self.methods[name].title) for name in order.methods], dict(order.strengths))

    def run(self, job: Job) -> None:
        """Fill every column when its turn has come. What a method cannot do costs only its own; afterwards the experts are as they were.

        Raises UserError if too many are waiting.
        """
        try:
            with self.turns.turn(job):
                job.check()
                job.state = "running"
                for column in job.columns:
                    self._fill(job, column)
                job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except UserError:
            job.state = "refused"
            raise

    def _fill(self, job: Job, column: Column) -> None:
        method = self.methods[column.method]
        try:
            with _rescheduled(self.ensemble, method, job.order.scheduler):
                sampler = method.make()
                for seed in (nth_seed(job.order.seed, index) for index in range(job.order.images)):
                    job.at = (0, job.order.steps)
                    column.pictures.append(self._picture(job, column, method, sampler, seed))
        except UserError as error:
            column.error = str(error)
        except Cancelled:
            raise
        except Exception as error:  # out of memory, most likely: the other methods may still work
            column.error = unexpected(error)
        column.done = True

    def _picture(self, job: Job, column: Column, method: Method, sampler: Any, seed: int) -> Picture:
        job.check()
        metadata = self._metadata(job, method, sampler, seed)
        path = self.gallery.path(method.name, metadata)
        if self.gallery.made(path, metadata) and (not method.has_maps or path.name in self.shelf):
            return Picture(path, seed, metadata, kept=True)
        began = time.monotonic()
        changes: list[list[Any]] = []
        began_with = metadata["strengths"] or dict.fromkeys(self.ensemble.names, 1.0)

        def on_step(done: int, steps: int) -> None:
            job.on_step(done, steps)
            if method.scalable and job.strengths != (changes[-1][1] if changes else began_with):
                changes.append([done, dict(job.strengths)])

        with self._watched(job, method, sampler) as maps:
            image = sampler([Request(job.order.prompt, seed)], _sampling(job.order, self.guidance), on_step)[0]
        if changes:  # noticed after that step: such a picture is not made again from its settings
            metadata |= {"strength_changes": changes}
            path = self.gallery.path(method.name, metadata)
        self.gallery.save(path, image, metadata)
        if maps is not None:
            self.shelf.put(path.name, Kept.of(image, maps))
        column.seconds += time.monotonic() - began
        return Picture(path, seed, metadata, kept=False)

    @contextlib.contextmanager
    def _watched(self, job: Job, method: Method, sampler: Any) -> Iterator[WeightMaps | None]:
        """Inside, weights are recorded where there are some, and scaled where they can be."""
        with contextlib.ExitStack() as stack:
            if method.scalable:
                stack.enter_context(scale_weights(sampler.denoiser, job.strengths))
            yield stack.enter_context(record_weights(sampler.denoiser)) if method.has_maps else None

    def _metadata(self, job: Job, method: Method, sampler: Any, seed: int) -> dict[str, Any]:
        """What the picture will say of itself, as those of `afa generate` do."""
        order = job.order
        used = getattr(sampler, "pipeline", self.ensemble.frame).scheduler
        return {
            **asdict(_sampling(order, self.guidance)),
            "scheduler": type(used).__name__ if order.scheduler is None else order.scheduler,
            "source": public_place(self.sources[0] if len(self.sources) == 1 else self.sources),
            **method.record,
            "experts": list(self.ensemble.names),
            "aggregators": self.aggregators if method.record["method"] is None else None,
            "files": used_files(self.files, method.record["method"] is None),
            "dtype": self.dtype,
            "prompt": order.prompt,
            "seed": seed,
            "strengths": dict(job.strengths) if method.scalable and set(job.strengths.values()) != {1.0} else None,
        }


def _sampling(order: Order, guidance: float | None) -> Sampling:
    strength = guidance if order.guidance is None else order.guidance
    return Sampling(order.steps, strength, order.negative_prompt, order.height, order.width, order.true_guidance)


@contextlib.contextmanager
def _rescheduled(ensemble: Ensemble, method: Method, name: str | None) -> Iterator[None]:
    """Inside, samplers are made with another scheduler. Raises UserError for a method that makes its steps itself."""
    if name is not None and method.own_loop:
        raise UserError(f"{method.title} makes its steps itself; choose the experts' own scheduler for it, not {name}")
    before = [(part, part.scheduler) for part in (ensemble.frame, *ensemble.experts)]
    try:
        if name is not None:
            reschedule(ensemble, name)
        yield
    finally:
        for part, scheduler in before:
            part.scheduler = scheduler


def _limits(settings: UiSettings, ensemble: Ensemble) -> Limits:
    factor, call = ensemble.pipeline().vae_scale_factor, ensemble.denoiser.call
    side = call.side(ensemble.denoiser.config) or LATENTS
    own = factor * max(side if isinstance(side, (tuple, list)) else (side,))
    return Limits(settings.max_images, settings.max_steps, settings.max_side or 2 * own, factor * call.patch, own)
