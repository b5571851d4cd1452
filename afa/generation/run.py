"""Generate many images in a run that can resume. Each PNG says how it was made."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from tqdm import tqdm

from afa.checkpoint.manifest import AGGREGATORS, MANIFEST
from afa.defaults import GENERATION_STEPS, OUTER_STAGES
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import WeightMaps, check_strengths, record_weights, scale_weights
from afa.denoiser.parallel import check_parallel
from afa.denoiser.reuse import Reuse
from afa.devices import process_device
from afa.ensemble import Ensemble
from afa.errors import UserError, unknown
from afa.experts.quantised import LARGEST, check_store, store_weights
from afa.files import locked, read_arrays, refuse_busy, replacing, settled, sha256, write_atomically
from afa.fingerprint import Files, fingerprint, saved_fingerprint, summed
from afa.generation.settings import GenerateSettings
from afa.generation.speed import at_level
from afa.images import read_made, read_pixels
from afa.places import public_place
from afa.prompts import asked_prompts, warn_of_prompts
from afa.sampling.image_files import ImageFile, draw
from afa.sampling.registry import SAMPLING_METHODS, make_sampler
from afa.sampling.sample import PipelineSampler, Request, Sampling, in_frame
from afa.schedulers import reschedule
from afa.seeds import nth_seed, with_seed


def is_saved(source: str) -> bool:
    """Return whether this is the folder of a saved ensemble."""
    return (settled(Path(source)) / MANIFEST).exists()


def source_files(
    sources: Sequence[str],
    *,
    experts: Sequence[str] | None = None,
    frame: str | None = None,
    config: str | None = None,
    base: str | None = None,
) -> Files:
    """Return one hash for each expert, the frame, the ensemble and the base; PNGs record them.

    Arguments: see load_sources, and `base` of GenerateSettings.
    """
    if is_saved(sources[0]):
        saved = saved_fingerprint(Path(sources[0]), experts or [])
        return summed(saved | fingerprint(base=base))
    return summed(fingerprint(sources, frame=frame, config=config, base=base))


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
    config: str | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
    placement: str | None = None,
) -> Ensemble:
    """Load a saved ensemble, or make one of experts. An ensemble of one expert is that expert, bit for bit.

    experts: new places of a saved ensemble's experts, each NAME=PLACE, or folders to search
    frame, config, prediction_type, placement: of experts, see Ensemble.from_experts; placement `out` accepts
    experts of different architectures
    Raises UserError for options that do not fit together.
    """
    kind = getattr(torch, dtype)
    saved = [source for source in sources if is_saved(source)]
    if saved and len(sources) > 1:
        raise UserError(
            f"{saved[0]} is a saved ensemble, which has its experts; give it alone, or give experts only"
        )
    if saved and frame is not None:
        raise UserError(
            f"--frame {frame} is for experts, and {saved[0]} is a saved ensemble, which has its frame; "
            "leave it out"
        )
    if saved:
        return Ensemble.load(saved[0], experts or [], dtype=kind)
    if experts:
        raise UserError(
            f"--experts is for a saved ensemble, and {sources[0]} is none: it has no {MANIFEST}; "
            "give experts as SOURCE"
        )
    given = {"frame": frame, "dtype": kind, "config": config, "prediction_type": prediction_type}
    return Ensemble.from_experts(sources, aggregator="mean", placement=placement, **given)


GRID_UP_TO = 400  # images; a larger grid is no longer looked at


def generate(settings: GenerateSettings) -> list[Path]:
    """Generate the images that are missing in settings.output. Ctrl-C loses at most one batch.

    Several processes (accelerate launch) share the images, and so do commands with --shard.
    settings: the options of `afa generate`
    Returns the paths of all images, or with --shard of its part, one PNG each. Raises UserError.
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
    given = {name: getattr(settings, name) for name in ("experts", "frame", "config", "base")}
    files = source_files(settings.sources, **given)
    ensemble = _load(settings)
    if settings.expert is not None and settings.expert not in ensemble.names:
        raise UserError(unknown(settings.expert, ensemble.names, "expert"))
    if settings.weights and (settings.expert is not None or len(ensemble.names) == 1):
        raise UserError("--weights needs an ensemble of several experts; a single expert has no weight maps")
    sampling = _sampling(settings, ensemble)
    if settings.scheduler is not None:
        reschedule(ensemble, settings.scheduler)
    check_store(settings.store, device)
    if settings.store is not None:
        store_weights(ensemble.denoiser.experts, settings.store)
    whole = settings.parallel is not None
    if whole:
        check_parallel(settings.parallel, state.num_processes, len(ensemble.names), "generate")
        ensemble.denoiser.share_experts()
    sampler = _sampler(settings, ensemble.to(device))
    if state.is_main_process:
        interface, tokenizers = ensemble.denoiser.interface, ensemble.frame.tokenizers
        warn_of_prompts(prompts, interface, tokenizers)
        if sampling.negative_prompt:
            warn_of_prompts([sampling.negative_prompt], interface, tokenizers, "negative prompt")
    _check_strengths(settings, ensemble, sampler)
    images = _images(settings, sampling, prompts, ensemble, sampler, files)
    part, parts = settings.part()
    with locked(output, shared=settings.shard is not None):
        state.wait_for_everyone()  # until the first process has removed what killed ones left
        own = images[part::parts]
        with _compiled(settings, ensemble):
            share = own if whole else own[state.process_index :: state.num_processes]
            _draw(settings, sampling, sampler, share)
        group = ensemble.denoiser.group
        if group is not None and group.passes and state.is_main_process:
            megabytes = group.sent / group.passes / 1e6
            print(
                f"afa: {state.num_processes} processes; each got {megabytes:.3g} MB a step from the others",
                file=sys.stderr,
            )
        state.wait_for_everyone()
        if state.is_main_process and (parts == 1 or all(image.found() for image in images)):
            _finish(output, images, settings.images_per_prompt)
    return [image.path for image in own]


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


def _load(settings: GenerateSettings) -> Ensemble:
    """Load the saved ensemble, or the experts as an ensemble; one expert stays as it is, bit for bit."""
    method = None if settings.method is None else SAMPLING_METHODS[settings.method]
    # Predictions of experts of different architectures can be combined.
    placement = "out" if method is not None and method.only_predictions else None
    names = ("experts", "frame", "config", "prediction_type", "dtype")
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
    if not strengths:
        return
    try:
        check_strengths(ensemble.names, strengths)
    except ValueError as error:
        raise UserError(f"--strength: {error}") from None
    if not isinstance(getattr(sampler, "denoiser", None), EnsembleDenoiser) or len(ensemble.names) == 1:
        raise UserError(
            f"--strength scales aggregators' weights, and {settings.method or settings.sources[0]} has none; "
            "give a saved ensemble"
        )


def _images(
    settings: GenerateSettings,
    sampling: Sampling,
    prompts: list[str],
    ensemble: Ensemble,
    sampler: Any,
    files: Files,
) -> list[ImageFile]:
    """List all images in order. Seeds count on over prompts, so all images have different noise."""
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
        **({} if settings.base is None else {"base": public_place(settings.base)}),
        **({"store": settings.store} if settings.store in LARGEST else {}),
        **({"reuse": asdict(_reuse(settings))} if settings.reuse > 1 else {}),
        **({"shared_guidance_weights": True} if settings.shared_guidance_weights else {}),
    }
    images, copies = [], settings.images_per_prompt
    for index, prompt in enumerate(prompts):
        for copy in range(copies):
            request = Request(prompt, nth_seed(settings.seed, index * copies + copy))
            path = Path(settings.output) / f"{index:05d}-{copy:02d}.png"
            facts = {**common, "prompt": prompt, "seed": request.seed}
            images.append(ImageFile(path, request, facts, used_files(files, trained)))
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
    )


def _draw(settings: GenerateSettings, sampling: Sampling, sampler: Any, images: list[ImageFile]) -> None:
    """Draw the missing images batch by batch, with scaled and recorded weights if they are asked for."""
    missing = [
        image
        for image in images
        if image.found() is None or (settings.weights and not _weights_made(image.path))
    ]
    paths = {image.request: image.path for image in missing}
    PartialState().wait_for_everyone()  # all processes look before one writes
    saves = settings.parallel is None or PartialState().is_main_process

    def hooked(requests: Sequence[Request], sampling: Sampling) -> NDArray[np.uint8]:
        with contextlib.ExitStack() as hooks:
            if settings.weights:
                maps = hooks.enter_context(record_weights(sampler.denoiser))
            if settings.strength:
                hooks.enter_context(scale_weights(sampler.denoiser, settings.strengths()))
            drawn: NDArray[np.uint8] = sampler(requests, sampling)
        for index, request in enumerate(requests if settings.weights and saves else ()):
            _save_weights(paths[request], drawn[index], maps, index, len(requests))
        return drawn

    total, done = len(images), len(images) - len(missing)
    quiet = not PartialState().is_main_process
    with tqdm(total=total, initial=done, desc="images", unit="image", file=sys.stderr, disable=quiet) as bar:
        draw(missing, hooked, sampling, settings.batch_size, bar, saves=saves)


def _weights_made(path: Path) -> bool:
    """Return whether the weight maps of an image and their picture exist and are complete."""
    arrays = read_arrays(path.with_suffix(".weights.npz"))
    return arrays is not None and read_made(path.with_suffix(".weights.png")) is not None


def _save_weights(path: Path, image: NDArray[np.uint8], maps: WeightMaps, index: int, batch: int) -> None:
    """Save the weight maps of one image, and a picture of them.

    The .npz holds STAGE: (passes, N, h, w) float16, and timesteps: (passes,).
    """
    from afa.pictures import conditional, picture

    own = [{name: weights[index] for name, weights in one.items()} for one in conditional(maps, batch)]
    arrays = {name: torch.stack([one[name] for one in own]).half().numpy() for name in own[0]}
    with replacing(path.with_suffix(".weights.npz")) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, timesteps=np.asarray(maps.timesteps, np.float32), experts=np.asarray(maps.experts), **arrays
        )
    with replacing(path.with_suffix(".weights.png")) as temporary:
        picture(image, own, maps.experts, maps.timesteps).save(temporary, format="PNG")


def _finish(output: Path, images: list[ImageFile], columns: int) -> None:
    """Write images.jsonl (`afa train --data` reads it after a rename) and a grid with a row per prompt."""
    lines = []
    for image in images:
        facts = {"file_name": image.path.name, "text": image.request.prompt, "seed": image.request.seed}
        lines.append(json.dumps(facts, ensure_ascii=False))
    write_atomically(output / "images.jsonl", "\n".join(lines) + "\n")
    if 1 < len(images) <= GRID_UP_TO:
        from afa.pictures import grid

        pixels = [read_pixels(image.path) for image in images]
        width = columns if columns > 1 else min(8, len(pixels))
        rows = [pixels[start : start + width] for start in range(0, len(pixels), width)]
        with replacing(output / "grid.png") as temporary:
            grid(rows).save(temporary, format="PNG")
