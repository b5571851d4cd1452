"""What a merge of files will read and write, checked before anything is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa.devices import choose_device
from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.expert import TEXT_ENCODERS
from afa.experts.headers import BITS, DTYPES
from afa.experts.load import check_names
from afa.experts.locate import check_loras
from afa.experts.prediction import keys_of
from afa.experts.spec import ExpertSpec
from afa.files import present, refuse_busy
from afa.merging.keys import MERGED, KeyMerge, TensorSource, check_same_keys
from afa.merging.recipe import Recipe, Step, recipe_of
from afa.merging.registry import check_merge, find_merge
from afa.merging.settings import MergeSettings
from afa.merging.single_file import Place, names_by_key, original_places, shape_to_original
from afa.merging.sources import Reader, Source, Stored, add_loras, open_source, open_vae
from afa.models.registry import stage_names

LATENTS = "vae.decoder.conv_in.weight"  # its second dimension is the latents' channels
CODES = {dtype: code for code, dtype in DTYPES.items()}  # as a .safetensors header has them
TYPES = {code: getattr(torch, name) for code, name in DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


@dataclass(kw_only=True)
class PlannedStep(KeyMerge):
    """One step with its inputs found: the tensors of its result, one at a time.

    same: parts that are the same in all experts and the base, taken from the first as they are
    """

    step: Step
    experts: list[Source]
    base: Source | None
    vae: Source | None
    same: list[str] = field(default_factory=list)
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> Source:
        """The expert whose form the result takes."""
        return self.experts[0]

    @cached_property
    def merged_parts(self) -> list[str]:
        """The parts of a pipeline that are merged."""
        vae = ["vae"] if self.step.merge_vae else []
        return [part for part in self.first.parts if part in (*MERGED, *vae)]

    @property
    def inputs(self) -> list[tuple[str, Source, list[str]]]:
        """All that is read: as expert, base or vae; from where; which parts."""
        found = [("expert", source, self.merged_parts) for source in self.experts]
        found += [("base", self.base, self.merged_parts)] if self.base else []
        return found + ([("vae", self.vae, ["vae"])] if self.vae and not self.step.merge_vae else [])

    def origin(self, part: str) -> Source:
        """Where a part comes from that is not merged, and how it is laid out if it is."""
        return self.vae if part == "vae" and self.vae is not None else self.first

    def sources_of(self, key: str) -> Sequence[TensorSource]:
        """Experts and base of what is merged, and else where the key's part comes from."""
        part = key.partition(".")[0]
        merged = part in self.merged_parts and part not in self.same
        return super().sources_of(key) if merged else [self.origin(part)]

    def as_source(self, name: str) -> Source:
        """The result as an expert of a later step: laid out as the first expert."""
        first = self.first
        assert first.outline is not None
        tensors = {key: stored for key, stored in first.tensors.items() if not key.startswith("vae.")}
        vae = self.vae.tensors.items() if self.vae is not None else ()
        tensors |= {key: stored for key, stored in vae if key.startswith("vae.")}
        if self.step.dtype is not None:
            kept = {key: replace(one, dtype=self.step.dtype) for key, one in tensors.items() if one.is_float}
            tensors |= kept
        outline = replace(first.outline, expert=replace(first.outline.expert, name=name))
        return Source(name, first.located, tensors, first.config, first.spare, outline, step=self)

    def kept(self, key: str, reader: Reader) -> Tensor:
        """One key's value, computed once while a tensor of the result is made."""
        if key not in self._kept:
            dtype = getattr(torch, self.step.dtype) if self.step.dtype is not None else None
            self._kept[key] = self.value(key, reader, dtype)
        return self._kept[key]

    def forget(self) -> None:
        """Let the kept values go."""
        self._kept.clear()


@dataclass(frozen=True)
class Item:
    """One tensor to write: its name, code and shape in the file; from which keys, in which form.

    spare: a tensor of the first expert that is written as it is, instead. With neither, it is empty.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    keys: tuple[str, ...] = ()
    form: str = "same"
    spare: Stored | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * BITS[self.code] // 8


@dataclass
class Plan:
    """Everything that is decided: the steps, and the files to write, by their path in the output."""

    settings: MergeSettings
    recipe: Recipe
    steps: list[PlannedStep]
    files: dict[str, list[Item]]

    @property
    def last(self) -> PlannedStep:
        return self.steps[-1]

    @property
    def first(self) -> Source:
        """The expert whose form the result takes."""
        return self.last.first

    @property
    def dtype(self) -> str | None:
        return self.last.step.dtype

    def facts(self) -> dict[str, Any]:
        """The plan as plain data."""
        items = [item for items in self.files.values() for item in items]
        largest = max(prod(item.shape) for item in items)
        sizes: dict[str, int] = {}
        for item in items:
            dtype = DTYPES.get(item.code, item.code)
            sizes[dtype] = sizes.get(dtype, 0) + item.bytes
        *earlier, last = (_step_facts(planned) for planned in self.steps)
        return {
            **last,
            **({"steps": earlier} if earlier else {}),
            "output": self.settings.output,
            "layout": "original" if self.settings.single_file else "diffusers",
            "dtype": self.dtype or max(sizes, key=lambda code: sizes[code]),
            "tensors": len(items),
            "bytes": sum(item.bytes for item in items),
            # copies in float32 while the largest is merged
            "memory_bytes": 4 * largest * sum(len(planned.experts) + 3 for planned in self.steps),
        }


def _step_facts(planned: PlannedStep) -> dict[str, Any]:
    def place(source: Source) -> str:
        return f"step {source.step.step.name}" if source.step is not None else str(source.located.path)

    vae = planned.vae.name if planned.vae else None
    named = {"name": planned.step.name} if planned.step.name else {}
    return named | {
        "method": planned.step.method,
        "options": planned.options,
        "experts": {source.name: place(source) for source in planned.experts},
        "base": place(planned.base) if planned.base else None,
        "vae": "merged" if "vae" in planned.merged_parts else vae,
        "merged": planned.merged_parts,
    }


def make_plan(settings: MergeSettings, opened: Mapping[ExpertSpec, Source] | None = None) -> Plan:
    """Find and compare all sources, and lay out the result. Raises UserError for whatever cannot be done.

    opened: sources that were found already
    """
    recipe = recipe_of(settings)
    device = choose_device(settings.device)
    specs = [spec for step in recipe.steps for spec in (*step.experts, *([step.base] if step.base else []))]
    for step in recipe.steps:
        check_merge(step.method, len(step.experts), step.base is not None, step.options)
        check_names(step.experts)
    check_output(settings, specs)
    made: dict[str, PlannedStep] = {}
    planned = []
    for number, step in enumerate(recipe.steps, 1):
        try:
            planned.append(_plan_step(step, recipe, made, device, opened or {}))
        except UserError as error:
            raise UserError(
                f"{recipe.where}: step {number}: {error}" if len(recipe.steps) > 1 else str(error)
            ) from None
        made[step.name] = planned[-1]
    last = planned[-1]
    layout = (last.first, last.vae, last.step.dtype)
    files = (
        {settings.output: original_file(*layout)} if settings.single_file else dict(diffusers_files(*layout))
    )
    return Plan(settings, recipe, planned, files)


def check_output(settings: MergeSettings, specs: Sequence[ExpertSpec]) -> None:
    """The output must be new; nothing is overwritten, and no expert least of all."""
    output = Path(settings.output)
    for spec in specs:
        if Path(spec.source).resolve() == output.resolve():
            raise UserError(f"--output {output} is expert '{spec.name}' itself; choose another place")
    if settings.single_file and output.is_dir():
        raise UserError(f"{output} is a folder; a file of that name cannot be written")
    refuse_busy(output, file=settings.single_file)
    if output.is_file() or present(output):
        raise UserError(f"{output} exists already; choose another --output or delete it")


def _plan_step(
    step: Step,
    recipe: Recipe,
    made: Mapping[str, PlannedStep],
    device: torch.device,
    opened: Mapping[ExpertSpec, Source],
) -> PlannedStep:
    experts = [opened.get(spec) or _open(spec, recipe, made) for spec in step.experts]
    base = _open(step.base, recipe, made) if step.base is not None else None
    if step.vae is not None and not experts[0].located.whole_pipeline:
        alone = f"'{experts[0].name}' is a denoiser alone"
        raise UserError(f"--vae {step.vae} is for whole checkpoints, and {alone}; leave it out")
    vae = _vae(step, experts, recipe.config)
    _check_fit([*experts, *([base] if base else [])], step.merge_vae)
    merge, stages = find_merge(step.method), stage_names(experts[0].model)
    if merge.float64 and device.type == "mps":
        raise UserError(f"{step.method} computes in float64, which mps does not; leave out --device mps")
    # Recorded options are complete, and to be repeated to the last bit.
    options = merge.filled(step.options, len(experts), stages) if step.recorded is None else step.options
    return PlannedStep(
        merge=merge,
        options=dict(options),
        experts=experts,
        base=base,
        stages=experts[0].stages,
        device=device,
        step=step,
        vae=vae,
    )


def _open(spec: ExpertSpec, recipe: Recipe, made: Mapping[str, PlannedStep]) -> Source:
    """An expert's files, or the result of an earlier step."""
    if spec.source not in made:
        return open_source(spec, recipe.config)
    check_loras(spec)
    return add_loras(made[spec.source].as_source(spec.name), spec.loras)


def _vae(step: Step, experts: list[Source], config: str | None) -> Source | None:
    """Where the VAE comes from; None if the first expert has none and none was chosen."""
    if step.vae is None:
        return experts[0] if "vae" in experts[0].parts else None
    named = next((source for source in experts if source.name == step.vae), None)
    if named is not None and "vae" not in named.parts:
        raise UserError(f"'{named.name}' has no VAE; choose another with --vae")
    chosen = named or open_vae(step.vae, experts[0], config)
    mine, theirs = (source.tensors.get(LATENTS) for source in (experts[0], chosen))
    if mine and theirs and mine.shape[1] != theirs.shape[1]:
        channels = f"has {theirs.shape[1]} latent channels, expected {mine.shape[1]}"
        raise UserError(f"the VAE of '{chosen.name}' {channels}; choose another with --vae")
    return chosen


def _check_fit(sources: Sequence[Source], vae: bool) -> None:
    """Refuse what cannot be merged: as experts are compared, then weight by weight."""
    first, *others = sources
    reasons = mismatches([source.outline.expert for source in sources if source.outline])
    if reasons:
        raise UserError("; ".join(reasons))
    if vae:
        for source in sources:
            if "vae" not in source.parts:
                raise UserError(f"'{source.name}' has no VAE to merge; leave out --merge-vae")
    for other in others:
        for key, stored in first.tensors.items():
            its = other.tensors.get(key, stored)
            if its.is_float != stored.is_float:
                start = f"'{other.name}' cannot join '{first.name}'"
                raise UserError(f"{start}: {key} is {its.dtype}, expected {stored.dtype}")
        mine, theirs = (
            {key: shape for key, shape in source.floats().items() if vae or not key.startswith("vae.")}
            for source in (first, other)
        )
        check_same_keys(mine, theirs, other.name, first.name)


# ---- the files to write -----------------------------------------------------------------------------------


def diffusers_files(first: Source, vae: Source | None, dtype: str | None) -> Iterator[tuple[str, list[Item]]]:
    """One file per part of a pipeline (or of a bare denoiser), each tensor under its origin's name.

    first: the expert whose form the result takes
    vae:   whence the VAE comes
    dtype: of floats, None for the origin's
    Raises UserError for a pipeline without VAE.
    """
    parts = [part for part in first.parts if part != "vae"] + (["vae"] if vae else [])
    if vae is None and first.located.whole_pipeline:
        raise UserError(f"'{first.name}' has no VAE, and a pipeline's folder needs one; choose it with --vae")
    for part in parts:
        origin = vae if part == "vae" and vae else first
        own = {key: stored for key, stored in origin.tensors.items() if key.startswith(f"{part}.")}
        foreign = origin.origin(part).located.single_file
        named = {key: _diffusers_name(key) if foreign else stored.name for key, stored in own.items()}
        items = [Item(named[key], _code(stored, dtype), stored.shape, (key,)) for key, stored in own.items()]
        file = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
        yield f"{f'{part}/' if first.located.whole_pipeline else ''}{file}.safetensors", items


def _code(stored: Stored, dtype: str | None) -> str:
    return CODES[dtype] if dtype and stored.is_float else CODES.get(stored.dtype, stored.dtype)


def _diffusers_name(key: str) -> str:
    """A single file's tensor in a folder. CLIP's get a prefix that every version of transformers can read."""
    part, _, name = key.partition(".")
    clip = part in TEXT_ENCODERS and not name.startswith("text_projection")
    return f"text_model.{name}" if clip else name


def original_file(first: Source, vae: Source | None, dtype: str | None) -> list[Item]:
    """One file for all parts, or for a denoiser alone as the first expert's file has it. What that has
    besides (its EMA copy excepted) stays in; the empty tensors that say what a model predicts are its
    scheduler's.

    Arguments as above. Raises UserError for what the layout has no place for.
    """
    whole = first.denoiser == "unet" and first.located.whole_pipeline
    if not (whole or first.alone):
        what = "is only a denoiser" if first.denoiser == "unet" else f"has a {first.denoiser}"
        layout = "a single file in original layout is of a whole SD 1.x, 2.x or XL"
        raise UserError(f"'{first.name}' {what}, and {layout}; give a folder as --output")
    items: dict[str, Item] = {}
    for part in dict.fromkeys((*first.parts, *(["vae"] if vae else []))):
        origin = vae if part == "vae" and vae else first
        items |= {item.name: item for item in _original_part(part, origin, first, dtype)}
    assert first.outline is not None
    said = [Item(name, "F32", (0,)) for name in keys_of(first.outline.expert.scheduler)]
    spare = [(name, stored) for name, stored in first.spare.items() if name not in items]
    return [
        *items.values(),
        *said,
        *(Item(name, _code(one, None), one.shape, spare=one) for name, one in spare),
    ]


def _original_part(part: str, origin: Source, first: Source, dtype: str | None) -> Iterator[Item]:
    opened = part in TEXT_ENCODERS and first.open_clip(part)
    own = {
        key.partition(".")[2]: stored for key, stored in origin.tensors.items() if key.startswith(f"{part}.")
    }
    own = {
        name: stored for name, stored in own.items() if stored.is_float or not opened
    }  # OpenCLIP has no position_ids
    layout = first.located.layout if first.alone else None
    if layout is not None and layout.diffusers:
        places = {name: Place(layout.prefix + name) for name in own}
    else:
        shapes, xl = {name: stored.shape for name, stored in own.items()}, "text_encoder_2" in first.parts
        try:
            places = original_places(part, shapes, first.model, xl=xl, open_clip=opened)
        except ValueError as error:
            raise UserError(f"'{origin.name}': {error}; give a folder as --output") from None
    for key, names in names_by_key(places).items():
        form = places[names[0]].form
        shape = shape_to_original([own[name].shape for name in names], form)
        name = key if layout is None or layout.diffusers else layout.own(key)
        yield Item(name, _code(own[names[0]], dtype), shape, tuple(f"{part}.{name}" for name in names), form)
