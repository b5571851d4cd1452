"""What a merge of files will read and write, checked before anything is written."""

from collections.abc import Mapping, Sequence
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
from afa.experts.dtypes import DTYPES
from afa.experts.expert import TEXT_ENCODERS
from afa.experts.load import check_names
from afa.experts.locate import check_loras
from afa.experts.spec import ExpertSpec
from afa.files import present, refuse_busy
from afa.merging.keys import MERGED, KeyMerge, check_same_keys, check_values
from afa.merging.output import OutputTensor, diffusers_files, original_file
from afa.merging.recipe import MergeRecipe, MergeStep, recipe_of
from afa.merging.registry import check_merge, find_merge
from afa.merging.settings import MergeSettings
from afa.merging.sources import FileSource, Reader, add_loras, open_source, open_vae
from afa.models.registry import stage_names

LATENTS = "vae.decoder.conv_in.weight"  # its second dimension is the latents' channels


@dataclass(kw_only=True)
class PlannedStep(KeyMerge):
    """One step with its inputs found: the tensors of its result, one at a time.

    same:  parts that are the same in all experts and the base, taken from the first as they are
    alone: only the denoiser is merged and written: into a transformer's file, which holds nothing else
    """

    asked: MergeStep
    experts: list[FileSource]
    base: FileSource | None
    vae: FileSource | None
    same: list[str] = field(default_factory=list)
    alone: bool = False
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> FileSource:
        """The expert whose form the result takes."""
        return self.experts[0]

    @cached_property
    def merged_parts(self) -> list[str]:
        """The parts of a pipeline that are merged."""
        if self.alone:
            return [self.first.denoiser]
        vae = ["vae"] if self.asked.merge_vae else []
        return [part for part in self.first.parts if part in (*MERGED, *vae)]

    @property
    def models(self) -> list[FileSource]:
        """All that is merged: the experts, and the base."""
        return [*self.experts, *([self.base] if self.base else [])]

    @property
    def inputs(self) -> list[tuple[str, FileSource, list[str]]]:
        """All that is read: as expert, base or vae; from where; which parts."""
        found = [("expert", source, self.merged_parts) for source in self.experts]
        found += [("base", self.base, self.merged_parts)] if self.base else []
        if self.vae is None or self.asked.merge_vae or self.alone:
            return found
        return [*found, ("vae", self.vae, ["vae"])]

    def origin(self, part: str) -> FileSource:
        """Where a part comes from that is not merged, and how it is laid out if it is."""
        return self.vae if part == "vae" and self.vae is not None else self.first

    @property
    def parts(self) -> list[str]:
        """The parts of the result, the denoiser first."""
        if self.alone:
            return [self.first.denoiser]
        return [*(part for part in self.first.parts if part != "vae"), *(["vae"] if self.vae else [])]

    def as_source(self, name: str) -> "StepSource":
        """The result as an expert of a later step: laid out as the first expert."""
        first, dtype = self.first, self.asked.dtype
        tensors = {
            f"{part}.{key}": replace(stored, dtype=dtype) if dtype and stored.is_float else stored
            for part in self.parts
            for key, stored in self.origin(part).of(part).items()
        }
        assert first.description is not None
        description = replace(first.description, name=name)
        return StepSource(name, first.located, tensors, first.config, first.spare, description, step=self)

    def value(self, key: str, reader: Reader, dtype: torch.dtype | None = None) -> Tensor:
        """One key's merged value, or the value of the source that it comes from.

        dtype: of the result; None: as exact as it is computed
        Raises UserError for what is not finite, or does not fit, naming key and source.
        """
        part = key.partition(".")[0]
        sources = [self.origin(part)]
        if part in self.merged_parts and part not in self.same:
            sources = [source for source in self.models if key in source.tensors]
        tensors = [source.read(key, reader) for source in sources]
        check_values(key, tensors, [source.name for source in sources])
        return self.compute(key, tensors, dtype)

    def kept(self, key: str, reader: Reader) -> Tensor:
        """One key's value, computed once while a tensor of the result is made."""
        if key not in self._kept:
            dtype = getattr(torch, self.asked.dtype) if self.asked.dtype is not None else None
            self._kept[key] = self.value(key, reader, dtype)
        return self._kept[key]

    def forget(self) -> None:
        """Let the kept values go."""
        self._kept.clear()


@dataclass(kw_only=True)
class StepSource(FileSource):
    """The result of an earlier step of a recipe; `tensors` says what the step's first expert has."""

    step: PlannedStep

    def plain(self, key: str, reader: Reader) -> Tensor:
        """One tensor without LoRAs: what the step makes of it."""
        return self.step.kept(key, reader)

    def files(self, part: str) -> list[Path]:
        """No files: their hashes stand in the step."""
        return []

    def origin(self, part: str) -> FileSource:
        """An expert of the step that made it."""
        return self.step.origin(part).origin(part)

    @property
    def place(self) -> str:
        """The name of its step."""
        return f"step {self.step.asked.name}"


@dataclass
class MergePlan:
    """Everything that is decided: the steps, and the files to write, by their path in the output."""

    settings: MergeSettings
    recipe: MergeRecipe
    steps: list[PlannedStep]
    files: dict[str, list[OutputTensor]]

    @property
    def last(self) -> PlannedStep:
        """The step that makes the result."""
        return self.steps[-1]

    @property
    def first(self) -> FileSource:
        """The expert whose form the result takes."""
        return self.last.first

    @property
    def dtype(self) -> str | None:
        """The number format that was asked for; None: that of the first expert."""
        return self.last.asked.dtype

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
    vae = planned.vae.name if planned.vae and not planned.alone else None
    named = {"name": planned.asked.name} if planned.asked.name else {}
    return named | {
        "method": planned.asked.method,
        "options": planned.options,
        "experts": {source.name: source.place for source in planned.experts},
        "base": planned.base.place if planned.base else None,
        "vae": "merged" if "vae" in planned.merged_parts else vae,
        "merged": planned.merged_parts,
    }


def make_plan(settings: MergeSettings, opened: Mapping[ExpertSpec, FileSource] | None = None) -> MergePlan:
    """Find and compare all sources, and lay out the result. Raises UserError for whatever cannot be done.

    opened: sources that were found already
    """
    recipe = recipe_of(settings)
    device = choose_device(settings.device)
    specs = [spec for step in recipe.steps for spec in step.specs]
    for step in recipe.steps:
        check_merge(step.method, len(step.experts), step.base is not None, step.options)
        check_names(step.experts)
    check_output(Path(settings.output), settings.single_file, specs)
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
    if settings.single_file and last.first.denoiser != "unet":
        check_alone(planned)
    files = {settings.output: original_file(last)} if settings.single_file else dict(diffusers_files(last))
    return MergePlan(settings, recipe, planned, files)


def check_alone(steps: Sequence[PlannedStep]) -> None:
    """Have steps merge only the denoiser, for a transformer's file.

    Raises UserError where that would lose something: a VAE that was chosen, or text encoders that differ.
    """
    holds, advice = "the file of a transformer holds only the transformer", "give a folder as --output"
    for step in steps:
        asked = "--merge-vae" if step.asked.merge_vae else f"--vae {step.asked.vae}"
        if step.asked.merge_vae or step.asked.vae is not None:
            raise UserError(f"{asked}: {holds}; leave it out, or {advice}")
    first, *others = [
        source for step in steps for source in step.models if not isinstance(source, StepSource)
    ]
    for source in (source for step in steps for source in step.models):
        part = next((key for key in source.loras if key.partition(".")[0] in TEXT_ENCODERS), None)
        if part is not None:
            raise UserError(f"a LoRA of '{source.name}' changes {part}, and {holds}; {advice}")
    assert first.description is not None
    for other in others:
        assert other.description is not None
        for part in first.description.text_parts:
            mine, its = (source.description.components[part] for source in (first, other))
            if not mine.same_as(its):
                differ = f"the {part} of '{other.name}' is another than that of '{first.name}'"
                raise UserError(f"{differ}, and {holds}; {advice}")
    for step in steps:
        step.alone = True


def check_output(output: Path, single_file: bool, specs: Sequence[ExpertSpec]) -> None:
    """The output must be new; nothing is overwritten, and no expert least of all."""
    for spec in specs:
        if Path(spec.source).resolve() == output.resolve():
            raise UserError(f"--output {output} is expert '{spec.name}' itself; choose another place")
    if single_file and output.is_dir():
        raise UserError(f"{output} is a folder; a file of that name cannot be written")
    refuse_busy(output, file=single_file)
    if output.is_file() or present(output):
        raise UserError(f"{output} exists already; choose another --output or delete it")


def _plan_step(
    step: MergeStep,
    recipe: MergeRecipe,
    made: Mapping[str, PlannedStep],
    device: torch.device,
    opened: Mapping[ExpertSpec, FileSource],
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
        asked=step,
        vae=vae,
    )


def _open(spec: ExpertSpec, recipe: MergeRecipe, made: Mapping[str, PlannedStep]) -> FileSource:
    """An expert's files, or the result of an earlier step."""
    if spec.source not in made:
        return open_source(spec, recipe.config)
    check_loras(spec)
    return add_loras(made[spec.source].as_source(spec.name), spec.loras)


def _vae(step: MergeStep, experts: list[FileSource], config: str | None) -> FileSource | None:
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


def _check_fit(sources: Sequence[FileSource], vae: bool) -> None:
    """Refuse what cannot be merged: as experts are compared, then weight by weight."""
    first, *others = sources
    reasons = mismatches([source.expert for source in sources])
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
