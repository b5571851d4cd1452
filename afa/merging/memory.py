"""Merges of models in memory: experts or pipelines in, a new one out; and many merges of the same experts."""

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.expert import TEXT_ENCODERS, Expert
from afa.experts.headers import current_name, is_position_ids, tied
from afa.experts.load import load_expert
from afa.experts.lora import fused, lora_parts
from afa.merging.keys import DENOISERS, MERGED, KeyMerge, check_same_keys, check_values, key_stages
from afa.merging.registry import check_merge, find_merge
from afa.models.registry import FAMILIES, stage_names

Parts = Mapping[str, nn.Module]  # of a pipeline, by name: unet, text_encoder …


class PartsMerge:
    """Merged values written into copies of the first model's parts, as often as wanted.

    experts, base: each its parts by name. names: the experts', and the base's at the end, for messages.
    parts:  the copies; they hold the first expert's values until the first merge
    stages: the denoiser's, in order
    Raises UserError for parts that do not fit, naming the key and both shapes.
    """

    def __init__(self, experts: Sequence[Parts], names: Sequence[str], base: Parts | None = None) -> None:
        self.parts = {part: copy.deepcopy(module) for part, module in experts[0].items()}
        for module in (module for part in self.parts.values() for module in part.modules()):
            ids = module._buffers.get("position_ids")
            if ids is not None and ids.is_floating_point():  # as merging programs leave them
                whole = torch.arange(ids.numel(), device=ids.device)
                module._buffers["position_ids"] = whole.reshape(ids.shape)
        models = [*experts, *([base] if base is not None else [])]
        self._models = [state(parts) for parts in models]  # the base is the last
        shapes = [{key: tensor.shape for key, tensor in model.items()} for model in self._models]
        for its, name in zip(shapes[1:], names[1:], strict=False):
            check_same_keys(shapes[0], its, name, names[0])
        for key in shapes[0]:
            check_values(key, [model[key] for model in self._models], names)
        self.count = len(experts)
        denoiser = next(module for name, module in self.parts.items() if name in DENOISERS)
        self.stages, self._targets = stage_names(denoiser), state(self.parts)
        self._key_stages = key_stages(self._targets, denoiser)
        self._written: dict[str, Any] = {}  # stage -> the weights that its values were last made with
        self.fallen_back = 0  # tensors of the last merge that its rule left as the base has them

    def apply(self, method: str, **options: Any) -> None:
        """Write one merge's values over the last ones. A base is used by those that need it.

        Of merges by stage, only stages whose weights changed since the last one are computed.
        Raises UserError if the options do not fit.
        """
        merge, before = find_merge(method), self._written
        models = self._models if merge.needs("base") else self._models[: self.count]
        check_merge(method, self.count, len(models) > self.count, options)
        complete = merge.filled(options, self.count, self.stages)
        work = KeyMerge(merge=merge, options=complete, stages=self._key_stages)
        now = complete["weights"] if merge.by_stage else {}
        self._written = {}  # should this be interrupted, nothing counts as written
        for key, target in self._targets.items():
            stage = self._key_stages[key]
            if stage not in now or before.get(stage) != now[stage]:
                target.copy_(work.compute(key, [model[key] for model in models], target.dtype))
        self._written, self.fallen_back = now, work.fallen_back
        work.say_fallen_back(len(self._targets))


class InMemoryMerge:
    """Many merges of the same experts, each written into one model in place: for a search over weights.

        merge = InMemoryMerge(experts)
        expert = merge.apply("mbw", weights={"others": 0.5})    # always the same object, with new values

    base:   for the merges of differences
    vae:    the name of the expert whose VAE the result has (default: the first's); it is that expert's own
            object, unless merge_vae asks for a merged one
    stages: the denoiser's, in order
    Raises UserError, with every reason, for experts that cannot be merged.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        base: Expert | None = None,
        *,
        vae: str | None = None,
        merge_vae: bool = False,
    ) -> None:
        models = [*experts, *([base] if base is not None else [])]
        check_experts(models)
        parts = [expert_parts(expert, merge_vae) for expert in models]
        names = [expert.name for expert in models]
        self._merge = PartsMerge(parts[: len(experts)], names, parts[-1] if base is not None else None)
        self.stages = self._merge.stages
        merged = self._merge.parts
        self.expert = dataclasses.replace(
            experts[0],
            name="merge",
            model=merged[FAMILIES[experts[0].family].component],
            text_encoders=[merged[part] for part in TEXT_ENCODERS if part in merged],
            vae=merged.get("vae") or _vae_of(experts, vae),
            located=None,
            config=None,
            hashes={},
        )

    def apply(self, method: str, **options: Any) -> Expert:
        """Merge by a method of the registry, with its options. -> the expert, which the next call changes."""
        self._merge.apply(method, **options)
        return self.expert


def merge_experts(
    experts: Sequence[Expert],
    method: str = "weighted",
    *,
    base: Expert | None = None,
    vae: str | None = None,
    merge_vae: bool = False,
    **options: Any,
) -> Expert:
    """Merge experts in memory into a new one. The given experts do not change.

    experts:   such as ensemble.experts; of one architecture
    method:    weighted, mbw, add_difference, task_arithmetic, ties, dare, model_stock or slerp
    base:      the model that the experts were fine-tuned from, for add_difference, task_arithmetic, ties,
               dare and model_stock
    vae:       the name of the expert whose VAE the result has; None: the first expert's
    merge_vae: merge the VAEs too
    options:   of the method, such as weights=[2, 1] or t=0.5; see afa.merging.registry.MERGES
    Returns the new expert. Raises UserError, with every reason, for experts or options that do not fit.
    """
    check_merge(method, len(experts), base is not None, options)
    return InMemoryMerge(experts, base, vae=vae, merge_vae=merge_vae).apply(method, **options)


def merge_pipelines(
    pipelines: Sequence[Any],
    method: str = "weighted",
    *,
    base: Any = None,
    merge_vae: bool = False,
    **options: Any,
) -> Any:
    """Merge diffusers pipelines into a new one. The given pipelines do not change.

        merged = merge_pipelines([photo, paint], "mbw", weights="GRAD_V")

    pipelines: of one architecture. Denoiser and text encoders are merged; the rest is a copy of the first's
    method:    weighted, mbw, add_difference, task_arithmetic, ties, dare, model_stock or slerp
    base:      a pipeline of the model that the others were fine-tuned from, for the methods that need one
    merge_vae: merge the VAEs too
    options:   of the method, such as weights=[2, 1]; see afa.merging.registry.MERGES
    Returns the new pipeline. Raises UserError for pipelines or options that do not fit.
    """
    check_merge(method, len(pipelines), base is not None, options)
    models = [*pipelines, *([base] if base is not None else [])]
    names = [f"pipeline {place}" for place in range(len(pipelines))] + ["base"] * (base is not None)
    parts = [pipeline_parts(pipe, merge_vae) for pipe in models]
    for own, name in zip(parts, names, strict=True):
        if own.keys() != parts[0].keys():
            theirs, mine = ", ".join(own), ", ".join(parts[0])
            raise UserError(f"'{name}' cannot join '{names[0]}': it has {theirs}, expected {mine}")
    experts = zip(map(load_expert, models), names, strict=True)
    check_experts([dataclasses.replace(expert, name=name) for expert, name in experts])
    merge = PartsMerge(parts[: len(pipelines)], names, parts[-1] if base is not None else None)
    merge.apply(method, **options)
    first = pipelines[0]
    components = {
        name: merge.parts.get(name) or copy.deepcopy(part) for name, part in first.components.items()
    }
    built_with = inspect.signature(type(first).__init__).parameters  # also switches: requires_safety_checker
    switches = {name: first.config[name] for name in built_with if name in first.config}
    return type(first)(**{**switches, **components})


def check_experts(experts: Sequence[Expert]) -> None:
    """Raises UserError, with every reason, for experts that are not of one architecture."""
    if not experts:
        raise UserError("a merge needs at least one expert")
    try:
        reasons = mismatches(experts)
    except ValueError as error:
        raise UserError(str(error)) from None
    if reasons:
        raise UserError("; ".join(reasons))


def expert_parts(expert: Expert, vae: bool) -> dict[str, nn.Module]:
    """What is merged of an expert, by its names in a pipeline.

    LoRAs beside its weights are fused into copies.
    """
    parts = {name: fused(module) for name, module in lora_parts(expert).items()}
    return parts | ({"vae": expert.load_vae()} if vae else {})


def pipeline_parts(pipe: Any, vae: bool) -> dict[str, nn.Module]:
    """What is merged of a pipeline, LoRAs in its weights. Raises UserError if it has no denoiser."""
    names = (*MERGED, "vae") if vae else MERGED
    found = {name: fused(pipe.components[name]) for name in names if pipe.components.get(name) is not None}
    if not any(name in found for name in DENOISERS):
        raise UserError(f"a {type(pipe).__name__} has no unet or transformer that could be merged")
    return found


def _vae_of(experts: Sequence[Expert], name: str | None) -> nn.Module | None:
    """The chosen expert's VAE; None if the first has none and no expert was chosen."""
    names = [expert.name for expert in experts]
    if name is not None and name not in names:
        raise UserError(f"vae='{name}' is no expert's name; these are {', '.join(names)}")
    chosen = experts[0 if name is None else names.index(name)]
    return chosen.load_vae() if chosen.has_vae or name is not None else None


def state(parts: Parts) -> dict[str, Tensor]:
    """All parameters and buffers of some modules as "part.name", each once, without position ids.

    Raises UserError for weights that are not in memory.
    """
    found = {
        f"{part}.{current_name(name)}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    again = {f"{part}.{name}" for part, module in parts.items() for name in tied(module)}
    found = {key: tensor for key, tensor in found.items() if key not in again and not is_position_ids(key)}
    absent = next((key for key, tensor in found.items() if tensor.is_meta), None)
    if absent:
        raise UserError(
            f"{absent} is not in memory (offloaded, or without weights); merge before offloading is enabled"
        )
    return found
