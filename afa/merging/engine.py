"""A merge of checkpoints, from files to a file or folder, key by key: a few tensors are in memory."""

import json
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from afa.denoiser.schedule import kind_of
from afa.experts.folders import forget_places
from afa.experts.headers import BITS
from afa.experts.prediction import EPSILON, V
from afa.experts.single_file import KNOWN_CONFIGS
from afa.files import locked, replacing, sha256, staged
from afa.merging.configs import carried_configs, copy_surroundings
from afa.merging.keys import check_values
from afa.merging.plan import TYPES, Item, Plan, PlannedStep, check_output, make_plan
from afa.merging.recipe import KEY, Input, InputLora, check_input, record_text
from afa.merging.settings import MergeSettings
from afa.merging.single_file import to_original
from afa.merging.sources import Reader, Source
from afa.places import public_place

ALIGNED = 8  # a header is padded so that the tensors begin at a multiple
# ModelSpec's names of architectures (github.com/Stability-AI/ModelSpec), by pipeline and text width.
ARCHITECTURES = {
    ("StableDiffusionPipeline", 768): "stable-diffusion-v1",
    ("StableDiffusionPipeline", 1024): "stable-diffusion-v2",
    ("StableDiffusionXLPipeline", 2048): "stable-diffusion-xl-v1-base",
}
Hashes = Mapping[Path, str]  # of every file that is read: sha256


def merge_files(settings: MergeSettings, plan: Plan | None = None) -> dict[str, Any]:
    """Merge checkpoints from files to a file or folder. It needs the memory of a few tensors.

    settings: as the flags of `afa merge`
    plan:     what make_plan(settings) returned
    Returns what was done, ready for JSON. All or nothing is written. Raises UserError.
    """
    plan = plan or make_plan(settings)
    with locked(Path(settings.output), file=settings.single_file):
        check_output(settings, [])  # another process may have written it meanwhile
        return _merge(plan)


def _merge(plan: Plan) -> dict[str, Any]:
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


def write(plan: Plan, reader: Reader, strings: Mapping[str, str], bar: Any) -> None:
    """Write every file of the plan. strings: for the headers. bar: counts tensors."""

    def make(item: Item) -> Tensor:
        """One tensor of the output."""
        bar.update()
        if item.spare is not None:
            spare = reader.read(item.spare)
            check_values(item.name, [spare], [plan.first.name])
            return spare
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


def write_safetensors(
    path: Path, items: Iterable[Item], make: Callable[[Item], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file of these items as a stream: its header first, then one tensor after the other.

    Wider types come first, then names in order, as the library writes: the same merge gives the same bytes.
    The format: https://github.com/huggingface/safetensors#format
    """
    ordered = sorted(items, key=lambda item: (-BITS[item.code], item.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for item in ordered:
        header[item.name] = {
            "dtype": item.code,
            "shape": list(item.shape),
            "data_offsets": [end, end + item.bytes],
        }
        end += item.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for item in ordered:
            tensor = make(item)
            assert (
                tuple(tensor.shape) == item.shape and tensor.numel() * tensor.element_size() == item.bytes
            ), item
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---- what a merged file says of itself --------------------------------------------------------------------


def hash_sources(plan: Plan) -> dict[Path, str]:
    """sha256 of every file that is read, each read through once for it."""
    inputs = [found for planned in plan.steps for found in planned.inputs]
    files = {file for _, source, parts in inputs for part in parts for file in source.files(part)}
    loras = {Path(lora.path) for _, source, _ in inputs for lora in source.given}
    return {file: sha256(file) for file in sorted(files | loras)}


def same_parts(planned: PlannedStep, hashes: Hashes) -> list[str]:
    """Merged parts whose files are the same in all experts (and the base): they are read once."""
    sources = [*planned.experts, *([planned.base] if planned.base else [])]
    if any(source.step is not None or source.loras for source in sources):
        return []
    files = {
        part: {tuple(sorted(hashes[file] for file in source.files(part))) for source in sources}
        for part in planned.merged_parts
    }
    return [part for part, found in files.items() if len(found) == 1]


def metadata(plan: Plan, hashes: Hashes) -> dict[str, str]:
    """The strings in a merged file's header.

    Raises UserError for an input that is not what a recorded recipe was made with.
    """
    method, names = plan.last.step.method, [source.name for source in plan.last.experts]
    first, recipe = plan.first.outline, plan.recipe
    config = recipe.config if recipe.config in (None, *KNOWN_CONFIGS) else Path(recipe.config).resolve().name
    found = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"{method} merge of {', '.join(names)}",
        "modelspec.merged_from": ", ".join(names),
        KEY: record_text([_described_step(planned, plan, hashes) for planned in plan.steps], recipe, config),
    }
    text = first.expert.model.config.get("cross_attention_dim") if first else None
    architecture = (
        ARCHITECTURES.get((str(first.expert.pipeline), text)) if first and isinstance(text, int) else None
    )
    kind = kind_of(first.expert.scheduler) if first and first.expert.scheduler is not None else None
    found |= {"modelspec.prediction_type": "v" if kind == V else "epsilon"} if kind in (V, EPSILON) else {}
    found |= {"modelspec.architecture": architecture} if architecture else {}
    return found | (carried_configs(plan) if plan.settings.single_file else {})


def _described_step(planned: PlannedStep, plan: Plan, hashes: Hashes) -> dict[str, Any]:
    step, inputs = planned.step, {}
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


def described_input(source: Source, parts: list[str], hashes: Hashes) -> Input:
    """One source: its name, its place as far as that is public, and the sha256 of the files of some parts."""
    loras = [
        InputLora(source=str(public_place(lora.path)), sha256=hashes[Path(lora.path)], strength=lora.strength)
        for lora in source.given
    ]
    if source.step is not None:
        return Input(name=source.name, step=source.step.step.name, loras=loras)
    located, root = source.located, source.located.path
    files = sorted({file for part in parts for file in source.files(part)})
    names = [file.name if root.is_file() else file.relative_to(root).as_posix() for file in files]
    digests = {name: hashes[file] for name, file in zip(names, files, strict=True)}
    place = located.spec.source if located.commit else str(public_place(str(located.spec.source)))
    return Input(name=source.name, source=place, commit=located.commit, sha256=digests, loras=loras)
