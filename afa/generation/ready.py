"""From the options of a run to what draws it: an ensemble, samplers, and images with what they record."""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from afa.checkpoint.manifest import AGGREGATORS
from afa.defaults import GENERATION_STEPS, OUTER_STAGES
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import check_strengths
from afa.denoiser.parallel import check_parallel
from afa.denoiser.reuse import Reuse
from afa.ensemble import Ensemble
from afa.errors import UserError, unknown
from afa.experts.quantised import check_store, store_weights
from afa.files import sha256
from afa.fingerprint import Files
from afa.generation.drawing import Drawing
from afa.generation.grid import Grid
from afa.generation.packs import Packs
from afa.generation.prompt_loras import PromptLoras
from afa.generation.settings import GenerateSettings
from afa.generation.sources import LENT, load_sources, source_files, used_files
from afa.places import public_place
from afa.prompt_syntax import A1111, check_syntax
from afa.prompts import warn_of_prompts
from afa.sampling.image_files import ImageFile
from afa.sampling.regions import Region, as_strengths
from afa.sampling.registry import SAMPLING_METHODS, make_sampler
from afa.sampling.sample import PipelineSampler, Request, Sampling, in_frame
from afa.sampling.weighted_prompts import require_weights
from afa.schedulers import reschedule


def made_of(settings: GenerateSettings) -> Files:
    """Return one hash for each file that the images are made from."""
    given = {name: getattr(settings, name) for name in (*LENT, "experts", "config", "base")}
    return source_files(settings.sources, **given)


def ready_ensemble(
    settings: GenerateSettings,
    variants: Sequence[GenerateSettings],
    loras: PromptLoras,
    prompts: Sequence[str],
    device: str,
) -> Ensemble:
    """Load what draws, check that it can draw all prompts in all variants, and move it to the device."""
    ensemble = _load(settings, [variant.method for variant in variants])
    for variant in variants:
        _check_experts(variant, ensemble)
        _sampling(variant, ensemble)
    _check_prompts(settings, loras, ensemble, prompts)
    loras.load(ensemble)
    if settings.scheduler is not None:
        reschedule(ensemble, settings.scheduler)
    check_store(settings.store, device)
    if settings.store is not None:
        store_weights(ensemble.denoiser.experts, settings.store)
    if settings.parallel is not None:
        check_parallel(settings.parallel, PartialState().num_processes, len(ensemble.names), "generate")
        ensemble.denoiser.share_experts()
    ensemble.to(device)
    return ensemble


def make_drawing(
    settings: GenerateSettings,
    ensemble: Ensemble,
    asked: Sequence[tuple[str, int]],
    files: Files,
    regions: Sequence[Region],
    loras: PromptLoras,
    grid: Grid | None = None,
    packs: Packs | None = None,
) -> Drawing:
    """List the images of one variant, and make what draws them. asked: their prompts and seeds"""
    sampling, sampler = _sampling(settings, ensemble), _sampler(settings, ensemble)
    _check_strengths(settings, ensemble, sampler)
    images = _images(settings, sampling, asked, ensemble, sampler, files, loras, grid, regions, packs)
    strengths = as_strengths(regions, sampling.steps, ensemble.names)
    return Drawing(settings, sampling, sampler, images, strengths)


def _check_experts(settings: GenerateSettings, ensemble: Ensemble) -> None:
    """Raise UserError for an expert that is not there, and for weights of a single one."""
    if settings.expert is not None and settings.expert not in ensemble.names:
        raise UserError(unknown(settings.expert, ensemble.names, "expert"))
    if settings.weights and (settings.expert is not None or len(ensemble.names) == 1):
        raise UserError("--weights needs an ensemble of several experts; a single expert has no weight maps")


def _check_prompts(
    settings: GenerateSettings, loras: PromptLoras, ensemble: Ensemble, prompts: Sequence[str]
) -> None:
    """Warn of parts of prompts that are not read. Raises UserError for syntax that is not supported."""
    interface, tokenizers = ensemble.denoiser.interface, ensemble.frame.tokenizers
    negative = [settings.negative_prompt] if settings.negative_prompt else []
    for texts, what in ((prompts, "prompt"), (negative, "negative prompt")):
        if settings.prompt_syntax == A1111:
            require_weights(interface)
            check_syntax([loras.texts.get(text, text) for text in texts], what)
        if texts and PartialState().is_main_process:
            warn_of_prompts(texts, interface, tokenizers, what, settings.prompt_syntax)


def _load(settings: GenerateSettings, methods: Sequence[str | None]) -> Ensemble:
    """Load the saved ensemble, or the experts as an ensemble; one expert stays as it is, bit for bit.

    methods: that will draw
    """
    # Predictions of experts of different architectures can be combined.
    predictions = all(name is not None and SAMPLING_METHODS[name].only_predictions for name in methods)
    placement = "out" if predictions else None
    names = (*LENT, "experts", "config", "prediction_type", "dtype")
    given: dict[str, Any] = {name: getattr(settings, name) for name in names}
    return load_sources(settings.sources, **given, placement=placement)


def _sampler(settings: GenerateSettings, ensemble: Ensemble) -> Any:
    """Return the sampler of --method; by default that of the ensemble itself."""
    if settings.method is not None:
        options = settings.method_record() or {}
        return make_sampler(settings.method, ensemble, base=settings.base, **options)
    if settings.expert is not None:
        return make_sampler("single_in_ensemble", ensemble, expert=settings.expert)
    if settings.reuse > 1:
        ensemble.denoiser.reuse = _reuse(settings)
    if settings.shared_guidance_weights:
        ensemble.denoiser.share_guidance_weights = True
    return PipelineSampler(in_frame(ensemble, ensemble.denoiser))


def _reuse(settings: GenerateSettings) -> Reuse:
    return Reuse(settings.reuse, settings.reuse_outer or OUTER_STAGES, settings.lead)


def _check_strengths(settings: GenerateSettings, ensemble: Ensemble, sampler: Any) -> None:
    """Raise UserError for the strength of an unknown expert, or if no aggregator weighs the experts."""
    strengths = settings.strengths()
    if not strengths and not settings.region:
        return
    try:
        check_strengths(ensemble.names, strengths)
    except ValueError as error:
        raise UserError(f"--strength: {error}") from None
    flag = "--strength" if strengths else "--region"
    if not isinstance(getattr(sampler, "denoiser", None), EnsembleDenoiser) or len(ensemble.names) == 1:
        raise UserError(
            f"{flag} scales aggregators' weights, and {settings.method or settings.sources[0]} has none; "
            "give a saved ensemble"
        )


def _images(
    settings: GenerateSettings,
    sampling: Sampling,
    asked: Sequence[tuple[str, int]],
    ensemble: Ensemble,
    sampler: Any,
    files: Files,
    loras: PromptLoras,
    grid: Grid | None,
    regions: Sequence[Region],
    packs: Packs | None,
) -> list[ImageFile]:
    """List the images in order. asked: their prompts and seeds"""
    used = getattr(sampler, "pipeline", ensemble.frame).scheduler  # drawn experts have a pipeline each
    aggregators = Path(settings.sources[0]) / AGGREGATORS
    trained = settings.method is None and aggregators.exists()
    common = {
        **sampling.record(),
        "scheduler": type(used).__name__ if settings.scheduler is None else settings.scheduler,
        "source": public_place(settings.sources[0] if len(settings.sources) == 1 else settings.sources),
        "method": settings.method,
        "method_options": settings.method_record(),
        "expert": settings.expert,
        "experts": list(ensemble.names),
        "aggregators": sha256(aggregators) if trained else None,
        "dtype": settings.dtype,
        "strengths": dict.fromkeys(ensemble.names, 1.0) | settings.strengths() if settings.strength else None,
        "regions": [region.record() for region in regions] or None,
        **({} if settings.base is None else {"base": public_place(settings.base)}),
        # the CPU's memory changes where weights are, not what they are
        **({"store": settings.store} if settings.store not in (None, "cpu") else {}),
        **({"reuse": asdict(_reuse(settings))} if settings.reuse > 1 else {}),
        **({"shared_guidance_weights": True} if settings.shared_guidance_weights else {}),
    }
    images, copies = [], settings.images_per_prompt
    for index, (prompt, seed) in enumerate(asked):
        facts = {**common, "prompt": prompt, "seed": seed}
        name = f"{index // copies:05d}-{index % copies:02d}.png"
        path = Path(settings.output) / name if grid is None else grid.path(Path(settings.output), facts)
        request = Request(loras.texts.get(prompt, prompt), seed)
        used_loras = loras.files(prompt) if loras.chosen else {}
        made = used_files(files, trained) | used_loras
        packed = {} if packs is None else {"packed": functools.partial(packs.read, index)}
        images.append(ImageFile(path, request, facts, made, **packed))
    return images


def _sampling(settings: GenerateSettings, ensemble: Ensemble) -> Sampling:
    """Return the sampling options, with the guidance that PNGs record.

    Raises UserError for guidance that the family does not have.
    """
    interface, config = ensemble.denoiser.interface, ensemble.denoiser.config
    interface.pipeline_guidance(
        config, 1, settings.guidance, settings.negative_prompt, settings.true_guidance
    )
    guidance = interface.default_guidance(config) if settings.guidance is None else settings.guidance
    return Sampling(
        settings.steps or GENERATION_STEPS,
        guidance,
        settings.negative_prompt,
        settings.height,
        settings.width,
        settings.true_guidance,
        settings.interval(),
        settings.prompt_syntax,
    )
