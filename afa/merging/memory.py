"""Merges of models in memory: experts or pipelines in, a new one out; and many merges of the same experts."""

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.expert import Expert
from afa.experts.headers import is_position_ids, tied
from afa.experts.load import load_expert
from afa.experts.lora import fused
from afa.merging.keys import (  # fmt: skip
    DENOISERS,
    MERGED,
    TEXT_ENCODERS,
    check_same_keys,
    check_values,
    equal,
    key_stages,
    merge_key,
    say_fallen_back,
    stage_names,
    today,
)
from afa.merging.registry import check_merge, find_merge
from afa.merging.weights import Given, stage_weights
from afa.models.registry import FAMILIES

Parts = Mapping[str, nn.Module]  # of a pipeline, by name: unet, text_encoder …


@dataclass(frozen=True)
class Slot:
    """One key: where its merged value goes, and what it is made from.

    same: whether all experts have equal tensors; same_base: and the base, too.
    """

    key: str
    stage: str
    target: Tensor
    tensors: tuple[Tensor, ...]
    base: Tensor | None
    same: bool
    same_base: bool


class PartsMerge:
    """Merged values written into copies of the first model's parts, as often as wanted.

    experts, base: each its parts by name. names: the experts', and the base's at the end, for messages.
    parts: the copies; they hold the first expert's values until the first merge.
    Raises UserError for parts that do not fit, naming the key and both shapes.
    """

    def __init__(self, experts: Sequence[Parts], names: Sequence[str], base: Parts | None = None) -> None:
        self.parts = {part: copy.deepcopy(module) for part, module in experts[0].items()}
        self.count, self.based = len(experts), base is not None
        for module in (module for part in self.parts.values() for module in part.modules()):
            ids = module._buffers.get("position_ids")
            if ids is not None and ids.is_floating_point():  # as merging programs leave them
                module._buffers["position_ids"] = torch.arange(ids.numel(), device=ids.device).reshape(
                    ids.shape
                )
        self._slots = slots(self.parts, experts, names, base)
        self.stages = stage_names(_denoiser(self.parts))
        self.fallen_back = 0  # tensors of the last merge that a rule left as the base has them
        self._written: dict[
            str, tuple[float, ...]
        ] = {}  # stage -> the block weights its values were last made with

    def apply(self, method: str, **options: Any) -> None:
        """Write one merge's values over the last ones. A base is used by those that need it.

        Raises UserError if the options do not fit.
        """
        based = find_merge(method).needs("base")
        check_merge(method, self.count, self.based and based, options)
        if method == "mbw":
            self.apply_mbw(**options)
            return
        self._written, self.fallen_back = {}, 0
        for slot in self._slots:
            self._write(slot, method, options, based)
        say_fallen_back(method, self.fallen_back, len(self._slots))

    def apply_mbw(self, weights: Given, base_alpha: float | None = None) -> None:
        """Write a block-weighted merge; only stages whose weights changed since the last one are computed.

        weights: see afa.merging.weights.stage_weights.
        """
        rows = stage_weights(weights, self.stages, self.count, base_alpha)
        before, self._written = self._written, {}  # should this be interrupted, nothing counts as written
        for slot in self._slots:
            if before.get(slot.stage) != rows[slot.stage]:
                self._write(slot, "mbw", {"weights": rows}, based=False)
        self._written = rows

    @torch.no_grad()
    def _write(self, slot: Slot, method: str, options: dict[str, Any], based: bool) -> None:
        if slot.same_base if based else slot.same:
            slot.target.copy_(slot.tensors[0])
        else:
            where: dict[str, Any] = {
                "key": slot.key,
                "stage": slot.stage,
                "dtype": slot.target.dtype,
                "note": self._note,
            }
            slot.target.copy_(merge_key(find_merge(method).rule, slot.tensors, slot.base, **where, **options))

    def _note(self) -> None:
        self.fallen_back += 1


class InMemoryMerge:
    """Many merges of the same experts, each written into one model in place: for a search over weights.

        merge = InMemoryMerge(experts)
        expert = merge.apply_mbw({"others": 0.5, "OUT11": 1})    # always the same object, with new values

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
        everyone = [*experts, *([base] if base is not None else [])]
        check_experts(everyone)
        parts = [expert_parts(expert, merge_vae) for expert in everyone]
        names = [expert.name for expert in everyone]
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

    def apply_mbw(self, weights: Given, base_alpha: float | None = None) -> Expert:
        """Merge by block weights; stages whose weights are as in the last call are left as they are.

        weights: stage -> the second expert's share, or a weight per expert; other forms: see stage_weights.
        """
        self._merge.apply_mbw(weights, base_alpha)
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
    everyone = [*pipelines, *([base] if base is not None else [])]
    names = [f"pipeline {place}" for place in range(len(pipelines))] + ["base"]
    _check_pipelines(everyone, names)
    parts = [pipeline_parts(pipe, merge_vae) for pipe in everyone]
    merge = PartsMerge(parts[: len(pipelines)], names, parts[-1] if base is not None else None)
    merge.apply(method, **options)
    first = pipelines[0]
    components = {
        name: merge.parts.get(name) or copy.deepcopy(part) for name, part in first.components.items()
    }
    taken = inspect.signature(
        type(first).__init__
    ).parameters  # what it was built with besides: requires_safety_checker
    switches = {
        name: first.config[name] for name in taken if name in first.config and name not in first.components
    }
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
    encoders = dict(zip(TEXT_ENCODERS, expert.text_encoders, strict=False))
    modules = {FAMILIES[expert.family].component: expert.model, **encoders}
    parts = {name: fused(module) for name, module in modules.items()}
    return {**parts, **({"vae": expert.load_vae()} if vae else {})}


def pipeline_parts(pipe: Any, vae: bool) -> dict[str, nn.Module]:
    """What is merged of a pipeline, LoRAs in its weights. Raises UserError if it has no denoiser."""
    names = (*MERGED, "vae") if vae else MERGED
    found = {name: fused(pipe.components[name]) for name in names if pipe.components.get(name) is not None}
    if not any(name in found for name in DENOISERS):
        raise UserError(f"a {type(pipe).__name__} has no unet or transformer that could be merged")
    return found


def _check_pipelines(pipelines: Sequence[Any], names: Sequence[str]) -> None:
    """Parts first; then they are compared as experts are (names and shapes of weights are, in any case)."""
    first = pipelines[0]
    for pipe, name in zip(pipelines[1:], names[1:], strict=False):
        if set(pipeline_parts(pipe, False)) != set(pipeline_parts(first, False)):
            mine, theirs = (", ".join(pipeline_parts(one, False)) for one in (first, pipe))
            raise UserError(f"'{name}' cannot join '{names[0]}': it has {theirs}, expected {mine}")
    experts = [load_expert(pipe) for pipe in pipelines]
    check_experts(
        [dataclasses.replace(expert, name=name) for expert, name in zip(experts, names, strict=False)]
    )


def _vae_of(experts: Sequence[Expert], name: str | None) -> nn.Module | None:
    """The chosen expert's VAE; None if the first has none and nobody was chosen."""
    chosen = next((expert for expert in experts if expert.name == name), experts[0] if name is None else None)
    if chosen is None:
        raise UserError(
            f"vae='{name}' is no expert's name; these are {', '.join(expert.name for expert in experts)}"
        )
    has_one = chosen.vae is not None or (chosen.located is not None and chosen.located.whole_pipeline)
    return chosen.load_vae() if has_one or name is not None else None


def slots(targets: Parts, experts: Sequence[Parts], names: Sequence[str], base: Parts | None) -> list[Slot]:
    """Line up the state of some modules, by part, with that of the same parts of all experts and their base.

    names: of the experts, and of the base at the end. Raises UserError if they do not fit.
    """
    into = state(targets)
    states = [state(expert) for expert in (*experts, *([base] if base is not None else []))]
    shapes = [{key: tensor.shape for key, tensor in one.items()} for one in states]
    for one, name in zip(shapes[1:], names[1:], strict=False):
        check_same_keys(shapes[0], one, name, names[0])
    stages, found = key_stages(into, _denoiser(targets)), []
    for key, target in into.items():
        tensors = [one[key] for one in states]
        check_values(key, tensors, names)
        own = tensors.pop() if base is not None else None
        same = all(equal(tensors[0], other) for other in tensors[1:])
        found.append(
            Slot(
                key,
                stages[key],
                target,
                tuple(tensors),
                own,
                same,
                same and own is not None and equal(tensors[0], own),
            )
        )
    return found


def _denoiser(parts: Parts) -> nn.Module:
    return next(module for name, module in parts.items() if name in DENOISERS)


def state(parts: Parts) -> dict[str, Tensor]:
    """All parameters and buffers of some modules as "part.name", each once, without position ids.

    Raises UserError for weights that are not in memory.
    """
    found = {
        f"{part}.{today(name)}": tensor
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
