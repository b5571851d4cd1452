"""Explain several prompts: each image by itself, then all together.

The same command resumes an interrupted run.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from afa.checkpoint.manifest import MANIFEST
from afa.cost import count_stage_flops
from afa.denoiser.hooks import adjust_weights
from afa.devices import choose_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.explanation.causes import Counterfactual, Skipping, Unused, find_unused, rmse
from afa.explanation.chart import chart
from afa.explanation.explanation import (
    ExplainedImage,
    Explanation,
    check,
    explain,
    explained,
    read_entry,
    stem_of,
    write_arrays,
    write_facts,
)
from afa.explanation.page import as_html, dark_twin
from afa.explanation.pictures import contact, save_strip, sheet, words
from afa.explanation.settings import ExplainSettings
from afa.explanation.summary import as_json
from afa.files import locked, replacing, settled, write_atomically
from afa.fingerprint import check_claim, claim, saved_fingerprint
from afa.images import read_made, read_pixels
from afa.pictures import DARK, LIGHT
from afa.places import public_place
from afa.prompts import asked_prompts, warn_of_prompts
from afa.sampling.sample import Request, Sampling, in_frame, sample
from afa.schedulers import reschedule
from afa.schema import Within
from afa.seeds import nth_seed, with_seed
from afa.store import kept_json

STEPS = 50  # the default
RESULTS, PAGE, CHART = "explain.json", "explain.html", "chart.png"


@dataclass(frozen=True)
class ExplainRun:
    """The ensemble and the requests of a run.

    ensemble: on the device
    pipeline: of the ensemble
    sampling: steps, guidance and size
    requests: prompt and seed of every image
    settings: as given
    output:   folder of the results
    """

    ensemble: Ensemble
    pipeline: Any
    sampling: Sampling
    requests: list[Request]
    settings: ExplainSettings
    output: Path

    @property
    def facts(self) -> str:
        """The line under each prompt: steps, guidance, experts, fused stages."""
        guidance = "" if self.sampling.guidance is None else f", guidance {self.sampling.guidance:g}"
        experts, fused = len(self.ensemble.names), len(self.ensemble.denoiser.fused)
        return f"{self.sampling.steps} steps{guidance}, {experts} experts, {fused} fused stages"


def run(settings: ExplainSettings) -> dict[str, Any]:
    """Explain the images that are not explained yet, and write the results over all images.

    Returns the content of explain.json. Ctrl-C loses at most one image. Raises UserError.
    """
    settings = with_seed(settings)
    prompts = asked_prompts(settings.prompt, settings.prompts)
    device, output = choose_device(settings.device), Path(settings.output)
    if settings.ensemble is None or not (settled(Path(settings.ensemble)) / MANIFEST).exists():
        raise UserError(
            f"{settings.ensemble} is no saved ensemble: it has no {MANIFEST};"
            " make one with afa train, or leave it out for the embedded one"
        )
    asked = {**settings.binding(), "prompt": prompts}
    files = saved_fingerprint(Path(settings.ensemble), settings.experts or [])
    check_claim(output, asked, "the explanation", files)
    job = _prepare(settings, prompts, device)
    with locked(output):
        claim(output, asked, "the explanation", files)
        _explain(job)
        entries = [read_entry(output, stem_of(index)) for index in range(len(prompts))]
        unused = _unused(job, entries)
        drawn = {
            "ensemble": public_place(settings.ensemble),
            "guidance": job.sampling.guidance,
            "steps": job.sampling.steps,
        }
        found = as_json(asked | drawn, entries, unused, _skipped(job, unused, entries))
        means = np.mean([entry.means for entry in entries], axis=0)
        for ground in (LIGHT, DARK):
            drawn_chart = chart(unused, means, entries[0].timesteps, len(entries), ground)
            _save_png(drawn_chart, dark_twin(output / CHART) if ground is DARK else output / CHART)
        write_atomically(output / RESULTS, json.dumps(found, indent=1, ensure_ascii=False))
        write_atomically(output / PAGE, as_html(output, entries, unused, found, job.facts))
    return found


def _prepare(settings: ExplainSettings, prompts: list[str], device: torch.device) -> ExplainRun:
    """Load the ensemble and check the settings against it."""
    ensemble = Ensemble.load(
        str(settings.ensemble), settings.experts or [], dtype=getattr(torch, settings.dtype)
    )
    check(ensemble)
    warn_of_prompts(prompts, ensemble.denoiser.interface, ensemble.frame.tokenizers)
    interface, config = ensemble.denoiser.interface, ensemble.denoiser.config
    interface.pipeline_guidance(
        config, 1, settings.guidance, settings.negative_prompt, settings.true_guidance
    )
    guidance = interface.default_guidance(config) if settings.guidance is None else settings.guidance
    sides = settings.negative_prompt, settings.height, settings.width, settings.true_guidance
    sampling = Sampling(settings.steps or STEPS, guidance, *sides)
    if settings.scheduler is not None:
        reschedule(ensemble, settings.scheduler)
    pipeline = in_frame(ensemble.to(device), ensemble.denoiser)
    requests = [Request(prompt, nth_seed(settings.seed, index)) for index, prompt in enumerate(prompts)]
    return ExplainRun(ensemble, pipeline, sampling, requests, settings, Path(settings.output))


def _explain(job: ExplainRun) -> None:
    """Explain missing images, and save each as soon as it is complete."""
    done = [explained(job.output, stem_of(index)) for index in range(len(job.requests))]
    with tqdm(total=len(done), initial=sum(done), desc="explaining", unit="image", file=sys.stderr) as bar:
        for index, request in enumerate(job.requests):
            if not done[index]:
                found = explain(
                    job.ensemble,
                    request,
                    job.sampling,
                    job.settings.kinds,
                    job.settings.word_steps,
                    job.pipeline,
                )
                _save(job, stem_of(index), found)
                bar.update()


def _save(job: ExplainRun, stem: str, found: Explanation) -> None:
    """Write pictures and arrays, then the .json with their hashes."""
    recording, others = found.recording, found.counterfactuals
    names = [f"{stem}.png", f"{stem}.npz"]
    _save_png(Image.fromarray(recording.image), job.output / names[0])
    for ground in (LIGHT, DARK):
        drawn = {
            "sheet": sheet(recording, f"seed {found.request.seed}, {job.facts}", ground),
            "words": words(recording, found.causes, ground),
            "counterfactuals": contact(recording.prompt, recording.image, others, ground) if others else None,
        }
        for part, picture in drawn.items():
            if picture is not None:
                names.append(f"{stem}.{part}{ground.suffix}.png")
                _save_png(picture, job.output / names[-1])
        names.append(f"{stem}.strip{ground.suffix}.webp")
        with replacing(job.output / names[-1]) as temporary:
            save_strip(recording, temporary, ground)
    write_arrays(recording, job.output / f"{stem}.npz")
    write_facts(job.output, stem, found, names)


def _save_png(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _unused(job: ExplainRun, entries: list[ExplainedImage]) -> Unused:
    """Find the passes and stages at which experts are unused in all images."""
    latent = [
        side // job.pipeline.vae_scale_factor
        for side in read_pixels(job.output / f"{entries[0].stem}.png").shape[:2]
    ]
    tokens = job.ensemble.denoiser.interface.prompt_tokens(
        [encoder.config for encoder in job.ensemble.text_encoders]
    )
    costs = count_stage_flops(job.ensemble.experts[0].model, latent[0], latent[1], tokens)
    return find_unused(
        job.ensemble.denoiser, [entry.most for entry in entries], costs, job.settings.threshold
    )


def _skipped(job: ExplainRun, unused: Unused, entries: list[ExplainedImage]) -> list[float]:
    """Sample the images again without experts where they are unused; return their RMSE from the originals."""
    if "skipped" not in job.settings.kinds or not unused.cells.any():
        return []
    denoiser, found = job.ensemble.denoiser, []
    for entry, request in zip(
        tqdm(entries, desc="left out where unused", unit="image", file=sys.stderr), job.requests, strict=True
    ):
        record, picture = job.output / f"{entry.stem}.skipped.json", job.output / f"{entry.stem}.skipped.png"
        distance = _distance(record)
        if distance is None or read_made(picture) is None:
            before = read_pixels(job.output / f"{entry.stem}.png")
            with torch.no_grad(), adjust_weights(denoiser, Skipping(denoiser, unused)):
                after = sample(job.pipeline, [request], job.sampling)[0]
            distance = rmse(before, after)
            changed = Counterfactual("skipped", "experts left out where unused", after, distance)
            _save_png(contact(request.prompt, before, [changed]), picture)
            write_atomically(record, json.dumps({"rmse": distance}))
        found.append(distance)
    return found


def _distance(record: Path) -> float | None:
    """Read an RMSE that was saved before; None if the file is missing or damaged."""
    found: dict[str, float] = kept_json(record, dict[str, Annotated[float, Within(0, 255)]]) or {}
    return found.get("rmse")
