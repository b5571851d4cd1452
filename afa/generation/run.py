"""Generate many images in a run that can resume. Each PNG says how it was made."""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from afa.checkpoint.manifest import AGGREGATORS, MANIFEST
from afa.defaults import GENERATION_STEPS, OUTER_STAGES, PACK_SIZE
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import check_strengths
from afa.denoiser.parallel import check_parallel
from afa.denoiser.reuse import Reuse
from afa.devices import process_device
from afa.ensemble import Ensemble
from afa.errors import UserError, unknown
from afa.experts.quantised import check_store, store_weights
from afa.files import locked, refuse_busy, replacing, settled, sha256, write_atomically
from afa.fingerprint import Files, fingerprint, saved_fingerprint, summed
from afa.generation.drawing import Drawing, deal, draw_missing
from afa.generation.grid import Grid
from afa.generation.packs import Packs
from afa.generation.prompt_loras import PromptLoras
from afa.generation.settings import GenerateSettings
from afa.generation.speed import at_level
from afa.images import read_pixels
from afa.pictures import grid as grid_picture
from afa.places import public_place
from afa.prompt_syntax import A1111, check_syntax
from afa.prompts import asked_prompts, warn_of_prompts
from afa.sampling.image_files import ImageFile
from afa.sampling.regions import Region, as_strengths, read_mask
from afa.sampling.registry import SAMPLING_METHODS, make_sampler
from afa.sampling.sample import PipelineSampler, Request, Sampling, in_frame
from afa.sampling.weighted_prompts import require_weights
from afa.schedulers import reschedule
from afa.seeds import nth_seed, with_seed

LENT = ("frame", "text_encoder", "vae")  # options for experts that are denoisers alone


def is_saved(source: str) -> bool:
    """Return whether this is the folder of a saved ensemble."""
    return (settled(Path(source)) / MANIFEST).exists()


def source_files(
    sources: Sequence[str],
    *,
    experts: Sequence[str] | None = None,
    frame: str | None = None,
    text_encoder: Sequence[str] | None = None,
    vae: str | None = None,
    config: str | None = None,
    base: str | None = None,
) -> Files:
    """Return one hash for each expert, the frame, the ensemble and the base; PNGs record them.

    Arguments: see load_sources, and `base` of GenerateSettings.
    """
    if is_saved(sources[0]):
        saved = saved_fingerprint(Path(sources[0]), experts or [])
        return summed(saved | fingerprint(base=base))
    lent = {"frame": frame, "text_encoder": text_encoder, "vae": vae}
    return summed(fingerprint(sources, config=config, base=base, **lent))


def used_files(files: Files, trained: bool) -> Files:
    """Return the files that an image depends on.

    trained: whether the ensemble's own aggregators draw it (not a method that takes only its experts)
    """
    return {name: found for name, found in files.items() if trained or name != "the ensemble"}


def load_sources(
    sources: Sequence[str],
    *,
    experts: Sequence[str] | None = None,
    frame: str | None = None,
    text_encoder: Sequence[str] | None = None,
    vae: str | None = None,
    config: str | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
    placement: str | None = None,
) -> Ensemble:
    """Load a saved ensemble, or make one of experts. An ensemble of one expert is that expert, bit for bit.

    experts: new places of a saved ensemble's experts, each NAME=PLACE, or folders to search
    frame, text_encoder, vae, config, prediction_type, placement: of experts, see Ensemble.from_experts;
    placement `out` accepts experts of different architectures
    Raises UserError for options that do not fit together.
    """
    kind = getattr(torch, dtype)
    saved = [source for source in sources if is_saved(source)]
    if saved and len(sources) > 1:
        raise UserError(
            f"{saved[0]} is a saved ensemble, which has its experts; give it alone, or give experts only"
        )
    lent = {"frame": frame, "text-encoder": " ".join(text_encoder or ()) or None, "vae": vae}
    for flag, value in lent.items():
        if saved and value is not None:
            raise UserError(
                f"--{flag} {value} is for experts, and {saved[0]} is a saved ensemble, which has its frame; "
                "leave it out"
            )
    if saved:
        return Ensemble.load(saved[0], experts or [], dtype=kind)
    if experts:
        raise UserError(
            f"--experts is for a saved ensemble, and {sources[0]} is none: it has no {MANIFEST}; "
            "give experts as SOURCE"
        )
    read = {"dtype": kind, "config": config, "prediction_type": prediction_type}
    parts = {"frame": frame, "text_encoders": text_encoder or (), "vae": vae}
    return Ensemble.from_experts(sources, aggregator="mean", placement=placement, **read, **parts)


GRID_UP_TO = 400  # images; a larger grid is no longer looked at


def generate(settings: GenerateSettings) -> list[Path]:
    """Generate the images that are missing in settings.output. Ctrl-C loses at most one batch.

    Several processes (accelerate launch) share the images, and so do commands with --shard.
    settings: the options of `afa generate`
    Returns the paths of all images, or with --shard of its part, one PNG each; of shards, once they are
    packed. Raises UserError.
    """
    settings = at_level(settings)
    prompts = asked_prompts(settings.prompt, settings.prompts)
    device = process_device(settings.device)  # before minutes are spent on loading
    state = PartialState()
    drawn = [with_seed(settings).seed if state.is_main_process else settings.seed]
    settings = replace(settings, seed=broadcast_object_list(drawn)[0])
    output = Path(settings.output)
    if output.is_file():
        raise UserError(f"--output {output} is a file; give a folder")
    refuse_busy(output, shared=settings.shard is not None)
    packs = Packs(output, settings.pack, settings.pack_size or PACK_SIZE)
    regions = [
        region if path is None else replace(region, mask=read_mask(path))
        for region, path in settings.regions()
    ]
    grid = None if settings.grid is None else Grid(settings, prompts)
    variants = [settings] if grid is None else grid.variants
    loras = PromptLoras(settings.lora_dir, prompts if settings.prompt_syntax == A1111 else [])
    given = {name: getattr(settings, name) for name in (*LENT, "experts", "config", "base")}
    files = source_files(settings.sources, **given)
    ensemble = _load(settings, [variant.method for variant in variants])
    for variant in variants:
        _check_experts(variant, ensemble)
    samplings = [_sampling(variant, ensemble) for variant in variants]
    _check_prompts(settings, loras, ensemble, prompts)
    loras.load(ensemble)
    if settings.scheduler is not None:
        reschedule(ensemble, settings.scheduler)
    check_store(settings.store, device)
    if settings.store is not None:
        store_weights(ensemble.denoiser.experts, settings.store)
    whole = settings.parallel is not None
    if whole:
        check_parallel(settings.parallel, state.num_processes, len(ensemble.names), "generate")
        ensemble.denoiser.share_experts()
    ensemble.to(device)
    drawings = []
    for index, (variant, sampling) in enumerate(zip(variants, samplings, strict=True)):
        sampler = _sampler(variant, ensemble)
        _check_strengths(variant, ensemble, sampler)
        asked = _asked(settings, prompts) if grid is None else grid.requests[index]
        images = _images(variant, sampling, asked, ensemble, sampler, files, loras, grid, regions, packs)
        strengths = as_strengths(regions, sampling.steps, ensemble.names)
        drawings.append(Drawing(variant, sampling, sampler, images, strengths))
    part, parts = settings.part()
    own = deal(drawings, part, parts)
    with locked(output, shared=settings.shard is not None):
        state.wait_for_everyone()  # until the first process has removed what killed ones left
        first, step = (0, 1) if whole else (state.process_index, state.num_processes)
        shares = deal(own, first, step)
        total, quiet = sum(len(share.images) for share in shares), not state.is_main_process
        with (
            _compiled(settings, ensemble),
            tqdm(total=total, desc="images", unit="image", file=sys.stderr, disable=quiet) as bar,
        ):
            for share in shares:
                draw_missing(share, ensemble, loras, bar)
        group = ensemble.denoiser.group
        if group is not None and group.passes and state.is_main_process:
            megabytes = group.sent / group.passes / 1e6
            print(
                f"afa: {state.num_processes} processes; each got {megabytes:.3g} MB a step from the others",
                file=sys.stderr,
            )
        state.wait_for_everyone()
        images = [image for drawing in drawings for image in drawing.images]
        found: list[Any] = [None]  # by the first process: whether all are there; the shards of them
        if state.is_main_process and (parts == 1 or all(image.found() for image in images)):
            found[0] = _finish(output, drawings, grid, packs)
        packed = broadcast_object_list(found)[0]
    if packed:
        return packed
    return [image.path for drawing in own for image in drawing.images]


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


@contextlib.contextmanager
def _compiled(settings: GenerateSettings, ensemble: Ensemble) -> Iterator[None]:
    """With --compile, compile the denoiser at its first call. Raises UserError where no compiler works."""
    if not settings.compile:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    ensemble.denoiser.compile()
    try:
        yield
    except (BackendCompilerFailed, InductorError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"--compile does not work here: {why}; leave it out") from None


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


def _asked(settings: GenerateSettings, prompts: Sequence[str]) -> list[tuple[str, int]]:
    """Return all prompts with seeds. Seeds count on over prompts, so all images have different noise."""
    copies = settings.images_per_prompt
    return [
        (prompt, nth_seed(settings.seed, index * copies + copy))
        for index, prompt in enumerate(prompts)
        for copy in range(copies)
    ]


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
    packs: Packs,
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
        made_of = used_files(files, trained) | used_loras
        images.append(ImageFile(path, request, facts, made_of, packed=functools.partial(packs.read, index)))
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


def _finish(output: Path, drawings: Sequence[Drawing], grid: Grid | None, packs: Packs) -> list[Path]:
    """Write images.jsonl (`afa train --data` reads it after a rename) and a grid, or pack all images.

    Without --grid the grid has a row per prompt.
    Returns the shards, if images are packed.
    """
    images = [image for drawing in drawings for image in drawing.images]
    if packs.kind is not None:
        return packs.write(images)
    lines = []
    for image in images:
        facts = {"file_name": image.path.name, "text": image.request.prompt, "seed": image.request.seed}
        lines.append(json.dumps(facts, ensure_ascii=False))
    write_atomically(output / "images.jsonl", "\n".join(lines) + "\n")
    if grid is not None:
        sheet = grid.picture([[image.path for image in drawing.images] for drawing in drawings])
    elif 1 < len(images) <= GRID_UP_TO:
        pixels = [read_pixels(image.path) for image in images]
        columns = drawings[0].settings.images_per_prompt
        width = columns if columns > 1 else min(8, len(pixels))
        sheet = grid_picture([pixels[start : start + width] for start in range(0, len(pixels), width)])
    else:
        return []
    with replacing(output / "grid.png") as temporary:
        sheet.save(temporary, format="PNG")
    return []
