"""A merge of checkpoints, from files to a file or folder, key by key: a few tensors are in memory."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from afa.denoiser.schedule import kind_of
from afa.experts.expert import Expert
from afa.experts.folders import forget_places
from afa.experts.prediction import EPSILON, V
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.transformer_places import to_original
from afa.files import locked, replacing, sha256, staged
from afa.merging.configs import carried_configs, copy_surroundings
from afa.merging.keys import check_values
from afa.merging.output import TYPES, OutputTensor, write_safetensors
from afa.merging.plan import MergePlan, PlannedStep, StepSource, check_output, make_plan
from afa.merging.record import KEY, Input, InputLora, check_input, record_text
from afa.merging.settings import MergeSettings
from afa.merging.sources import FileSource, Reader
from afa.places import public_place

# ModelSpec's names of architectures (github.com/Stability-AI/ModelSpec), by pipeline and text width.
ARCHITECTURES = {
    ("StableDiffusionPipeline", 768): "stable-diffusion-v1",
    ("StableDiffusionPipeline", 1024): "stable-diffusion-v2",
    ("StableDiffusionXLPipeline", 2048): "stable-diffusion-xl-v1-base",
}
Hashes = Mapping[Path, str]  # of every file that is read: sha256


def merge_files(settings: MergeSettings, plan: MergePlan | None = None) -> dict[str, Any]:
    """Merge checkpoints from files to a file or folder. It needs the memory of a few tensors.

    settings: as the flags of `afa merge`
    plan:     what make_plan(settings) returned
    Returns what was done, ready for JSON. All or nothing is written. Raises UserError.
    """
    plan = plan or make_plan(settings)
    with locked(Path(settings.output), file=settings.single_file):
        check_output(
            Path(settings.output), settings.single_file, []
        )  # another process may have written it meanwhile
        return _merge(plan)


def _merge(plan: MergePlan) -> dict[str, Any]:
    began = time.perf_counter()
    hashes = hash_sources(plan)
    strings = metadata(plan, hashes)  # an input that is not what a recipe was made with is refused here
    for planned in plan.steps:
        planned.same = same_parts(planned, hashes)
    total = sum(len(items) for items in plan.files.values())
    with Reader() as reader, tqdm(total=total, desc="merging", unit="tensor", file=sys.stderr) as bar:
        write(plan, reader, strings, bar)
    seconds = round(time.perf_counter() - began, 2)
    for planned in plan.steps:
        planned.say_fallen_back(total)
    fallen_back = sum(planned.fallen_back for planned in plan.steps)
    found = {str(file): digest for file, digest in hashes.items()}
    return plan.facts() | {
        "same_in_all": plan.last.same,
        "fallen_back": fallen_back,
        "sha256": found,
        "seconds": seconds,
    }


def write(plan: MergePlan, reader: Reader, strings: Mapping[str, str], bar: Any) -> None:
    """Write every file of the plan. strings: for the headers. bar: counts tensors."""

    def make(item: OutputTensor) -> Tensor:
        """One tensor of the output."""
        bar.update()
        if item.spare is not None:
            spare = reader.read(item.spare)
            check_values(item.name, [spare], [plan.first.name])
            return spare.to(TYPES.get(item.code, spare.dtype))
        if not item.keys:
            return torch.empty(0)
        tensors = [plan.last.value(key, reader, TYPES.get(item.code)) for key in item.keys]
        for planned in plan.steps:
            planned.forget()
        return to_original(tensors, item.form)

    output = Path(plan.settings.output)
    if plan.settings.single_file:
        with replacing(output) as path:
            write_safetensors(path, plan.files[plan.settings.output], make, strings)
        return
    with staged(output, last="model_index.json") as stage:
        copy_surroundings(plan, stage)
        forget_places(stage)
        for name, items in plan.files.items():
            write_safetensors(stage / name, items, make, strings)


# ---- what a merged file says of itself --------------------------------------------------------------------


def hash_sources(plan: MergePlan) -> dict[Path, str]:
    """sha256 of every file that is read, each read through once for it."""
    inputs = [found for planned in plan.steps for found in planned.inputs]
    files = {file for _, source, parts in inputs for part in parts for file in source.files(part)}
    loras = {Path(lora.path) for _, source, _ in inputs for lora in source.given}
    return {file: sha256(file) for file in sorted(files | loras)}


def same_parts(planned: PlannedStep, hashes: Hashes) -> list[str]:
    """Merged parts whose files are the same in all experts (and the base): they are read once."""
    sources = planned.models
    if any(isinstance(source, StepSource) or source.loras for source in sources):
        return []
    files = {
        part: {tuple(sorted(hashes[file] for file in source.files(part))) for source in sources}
        for part in planned.merged_parts
    }
    return [part for part, found in files.items() if len(found) == 1]


def metadata(plan: MergePlan, hashes: Hashes) -> dict[str, str]:
    """The strings in a merged file's header.

    Raises UserError for an input that is not what a recorded recipe was made with.
    """
    names = ", ".join(source.name for source in plan.last.experts)
    recipe, steps = plan.recipe, [_described_step(planned, plan, hashes) for planned in plan.steps]
    config = recipe.config if recipe.config in (None, *KNOWN_CONFIGS) else Path(recipe.config).resolve().name
    found = {
        "format": "pt",
        **model_spec(plan.first.expert, f"{plan.last.asked.method} merge of {names}"),
        "modelspec.merged_from": names,
        KEY: record_text(steps, config, recipe.prediction_type),
    }
    return found | (carried_configs(plan) if plan.settings.single_file else {})


def model_spec(expert: Expert, title: str) -> dict[str, str]:
    """Return what a header says of a model by the ModelSpec standard, as far as it is known."""
    architecture = ARCHITECTURES.get((expert.pipeline, expert.model.config.get("cross_attention_dim")))
    kind = None if expert.scheduler is None else kind_of(expert.scheduler)
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.prediction_type": {V: "v", EPSILON: "epsilon"}.get(kind),
        "modelspec.architecture": architecture,
    }
    return {name: text for name, text in found.items() if text is not None}


def _described_step(planned: PlannedStep, plan: MergePlan, hashes: Hashes) -> dict[str, Any]:
    step, inputs = planned.asked, {}
    for role, source, parts in planned.inputs:
        now = described_input(source, parts, hashes)
        then = now if step.recorded is None else step.recorded.get((role, now.name), now)
        check_input(then, now, plan.recipe.where)
        inputs.setdefault(role, []).append(then.plain())
    named = {"name": step.name} if step.name and planned is not plan.last else {}
    return named | {
        "method": step.method,
        "options": planned.options,
        "experts": inputs["expert"],
        "base": inputs.get("base", [None])[0],
        "vae": "merged" if "vae" in planned.merged_parts else inputs.get("vae", [None])[0],
        "dtype": step.dtype,
    }


def described_input(source: FileSource, parts: list[str], hashes: Hashes) -> Input:
    """One source: its name, its place as far as that is public, and the sha256 of the files of some parts."""
    loras = [
        InputLora(source=str(public_place(lora.path)), sha256=hashes[Path(lora.path)], strength=lora.strength)
        for lora in source.given
    ]
    if isinstance(source, StepSource):
        return Input(name=source.name, step=source.step.asked.name, loras=loras)
    located, root = source.located, source.located.path
    files = sorted({file for part in parts for file in source.files(part)})
    names = [file.name if root.is_file() else file.relative_to(root).as_posix() for file in files]
    digests = {name: hashes[file] for name, file in zip(names, files, strict=True)}
    place = located.spec.source if located.commit else str(public_place(str(located.spec.source)))
    return Input(name=source.name, source=place, commit=located.commit, sha256=digests, loras=loras)
