"""An ensemble's folder and ComfyUI's MODELs become one MODEL; every reason why they do not fit is here."""

import copy
import dataclasses
import importlib
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from afa.checkpoint.aggregator_files import check_file, fill, read_tensors
from afa.checkpoint.manifest import ExpertEntry, Manifest, read_manifest, recipe_of
from afa.comfyui.network import NetworkReader, reader_of
from afa.comfyui.patches import check_patches, left_out
from afa.comfyui.running import KEY, RunningEnsemble, network_of, patches_of
from afa.errors import UserError
from afa.files import sha256
from afa.stages.stage import Stage

log = logging.getLogger(__name__)
# what ComfyUI calls a kind of prediction -> what a manifest calls it
PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}
# inputs of ComfyUI's loaders that name a file -> the kind of folder that it lies in
FILES = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models"}


def combine(models: Sequence[Any], folder: Path) -> Any:
    """Make one MODEL of the MODELs of an ensemble's experts.

    models: ComfyUI's ModelPatchers, in the ensemble's order
    folder: of the ensemble
    Returns a clone of the first MODEL that carries the others and the aggregators.
    Raises UserError, with the first reason, if they do not fit.
    """
    manifest = read_manifest(folder)
    check_file(folder, manifest)
    names = [entry.name for entry in manifest.experts]
    if len(models) != len(names):
        raise UserError(
            f"{folder} is an ensemble of {len(names)} experts, {len(models)} MODELs are connected; "
            f"connect, in this order, {', '.join(names)}"
        )
    where = [f"MODEL {place} ({name})" for place, name in enumerate(names, start=1)]
    reader, stages = _check_networks(models, manifest, folder, where)
    _check_predictions(models, manifest, folder, where)
    for patcher, name in zip(models, where, strict=True):
        check_patches(patcher.model_options["transformer_options"], name)
    for patcher, name in zip(models[1:], where[1:], strict=True):
        if ignored := left_out(patcher):
            log.warning(
                "%s: %s is not used; of what surrounds a network, the first MODEL's is",
                name,
                ", ".join(ignored),
            )
    time, text, _ = reader.widths(network_of(models[0]))
    aggregators = _aggregators(manifest, folder, stages, (time, text))
    made, others, places = _separate(models, where)
    management = importlib.import_module("comfy.model_patcher")
    held = management.ModelPatcher(
        aggregators, load_device=made.load_device, offload_device=made.offload_device
    )
    ensemble = RunningEnsemble(
        names=tuple(names),
        reader=reader,
        aggregators=aggregators,
        recipe=recipe_of(manifest),
        places=places,
        entered=dict(models[0].model_options["transformer_options"]),
        patched=patches_of(made),
    )
    kinds = importlib.import_module("comfy.patcher_extension").WrappersMP
    made.set_attachments(KEY, ensemble)
    made.set_additional_models(KEY, others)
    made.set_additional_models(f"{KEY}_aggregators", [held])
    made.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, ensemble.sample)
    if reader.wrapped:
        made.add_wrapper_with_key(kinds.DIFFUSION_MODEL, KEY, ensemble.predict)
    else:
        made.add_wrapper_with_key(kinds.APPLY_MODEL, KEY, ensemble.apply)
    return made


def _check_networks(
    models: Sequence[Any], manifest: Manifest, folder: Path, where: Sequence[str]
) -> tuple[NetworkReader, tuple[Stage, ...]]:
    """Return the reader of the networks and the first one's stages. Raises UserError if they do not fit."""
    wanted = [(stage["name"], stage["channels"]) for stage in manifest.stages]
    first: tuple[NetworkReader, tuple[Stage, ...], int, Any] | None = None
    for patcher, name in zip(models, where, strict=True):
        if patcher.get_attachment(KEY) is not None:
            raise UserError(f"{name} is an ensemble itself; connect the MODEL of a loader")
        network = network_of(patcher)
        reader = reader_of(network, name)
        if reader.family != manifest.family:
            raise UserError(
                f"{name} is of family {reader.family}, {folder} is an ensemble of family {manifest.family}; "
                "connect the experts that it was trained with"
            )
        stages, text, dtype = reader.stages(network), reader.widths(network)[2], _compute_dtype(patcher)
        for found, expected in zip([(one.name, one.channels) for one in stages], wanted, strict=False):
            if found != expected:
                raise UserError(
                    f"{name} has {found[1]} channels at stage {found[0]}, {folder} expects {expected[1]} at "
                    f"{expected[0]}; connect the experts that it was trained with"
                )
        if len(stages) != len(wanted):
            raise UserError(
                f"{name} has {len(stages)} stages, {folder} expects {len(wanted)}; "
                "connect the experts that it was trained with"
            )
        first = first or (reader, stages, text, dtype)
        if text != first[2]:
            raise UserError(
                f"{name} reads text of width {text}, {where[0]} of width {first[2]}; "
                "experts must share one architecture"
            )
        if dtype != first[3]:
            raise UserError(
                f"{name} computes in {dtype}, {where[0]} in {first[3]}; load all with the same weight_dtype"
            )
    assert first is not None
    return first[0], first[1]


def _compute_dtype(patcher: Any) -> Any:
    """Return the dtype in which a MODEL computes, which may differ from that of its weights."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model_dtype()


def _check_predictions(models: Sequence[Any], manifest: Manifest, folder: Path, where: Sequence[str]) -> None:
    """Raise UserError if experts predict different things; warn if it is another one than in training."""
    kinds = [patcher.model.model_type.name for patcher in models]
    recorded = [entry.prediction_type for entry in manifest.experts]
    if len({one for one in recorded if one}) > 1 or len(set(kinds)) > 1:
        raise UserError(
            f"the experts of {folder} predict different things "
            f"({', '.join(f'{name}: {kind}' for name, kind in zip(where, kinds, strict=True))}), "
            "which are not converted in ComfyUI; sample with afa generate"
        )
    known = PREDICTIONS.get(kinds[0])
    if known is not None and recorded[0] not in (None, known):
        log.warning(
            "%s is loaded as %s, the ensemble was made with %s; set it with ModelSamplingDiscrete",
            where[0],
            known,
            recorded[0],
        )


def _aggregators(
    manifest: Manifest, folder: Path, stages: Sequence[Stage], widths: tuple[int, int]
) -> nn.ModuleDict:
    """Make and fill the aggregators of an ensemble. widths: of the time embedding and of the text"""
    recipe, tensors = recipe_of(manifest), read_tensors(folder)
    deep = {name.partition(".")[0] for name in tensors if ".transformer." in name}
    fused = {stage["name"] for stage in manifest.stages if stage["fused"]}
    made = nn.ModuleDict()
    for stage in stages:
        if stage.name in fused:
            # which maps have attention was decided by the experts' own size, which ComfyUI does not know
            depth = {"depth": 0} if "depth" in recipe.options and stage.name not in deep else {}
            own = dataclasses.replace(recipe, options={**recipe.options, **depth}, attention_up_to=None)
            made[stage.name] = own.make(stage, 0, len(manifest.experts), *widths, last=stage is stages[-1])
    fill(made, tensors, folder)
    return made.requires_grad_(False).eval()


def _separate(models: Sequence[Any], where: Sequence[str]) -> tuple[Any, list[Any], list[int]]:
    """Return a clone of the first MODEL, the others that have weights of their own, and each expert's place.

    MODELs of one loader with different LoRAs share their weights in memory, which ComfyUI patches for one
    of them at a time: all but the first are copied. Equal MODELs stay one.
    """
    kept: list[Any] = []
    places = []
    for model, name in zip(models, where, strict=True):
        same = [place for place, other in enumerate(kept) if _equal(model, other)]
        if not same:
            shared = any(model.model is other.model for other in kept)
            kept.append(_copy(model, name) if shared else model.clone())
        places.append(same[0] if same else len(kept) - 1)
    return kept[0], kept[1:], places


def _equal(model: Any, other: Any) -> bool:
    """Whether two MODELs are one network with the same patches, also where a copy was made of one of them."""
    base = getattr(other, "afa_copy_of", other.model)
    return model.model is base and model.patches_uuid == other.patches_uuid and _plain(model) == _plain(other)


def _plain(model: Any) -> tuple[Any, ...]:
    """What of a MODEL, besides patches of its weights, changes what its network computes."""
    options = model.model_options["transformer_options"]
    return options.get("patches", {}), options.get("patches_replace", {}), model.object_patches


def _copy(model: Any, where: str) -> Any:
    """Return a clone of a MODEL with weights of its own; models are unloaded first, to get bare weights.

    A core after 0.3.64 reads the file again, which also works where it streams weights to the GPU.
    where: the input that the MODEL is from, for the message
    """
    importlib.import_module("comfy.model_management").unload_all_models()
    if getattr(model, "cached_patcher_init", None) is not None:  # of the core's own loaders
        made = model.deepclone_multigpu()
        made.clone_base_uuid = uuid.uuid4()  # not this MODEL on another GPU
    elif getattr(model, "is_dynamic", bool)():
        raise UserError(
            f"{where} and a MODEL before it share weights of a loader that cannot read its file again; take "
            "a loader of ComfyUI itself, or start ComfyUI with --disable-dynamic-vram"
        )
    else:
        made, shared = model.clone(), model.model.model_config  # settings; those of later cores have no copy
        made.model, made.parent = copy.deepcopy(model.model, {id(shared): shared}), None
        made.backup, made.object_patches_backup, made.hook_backup = {}, {}, {}
        made.backup_buffers, made.pinned = {}, set()
    made.afa_copy_of = model.model
    return made


def provenance(
    prompt: Mapping[str, Any], node: str, inputs: Sequence[str], folder: Path, paths: Any
) -> list[str]:
    """Compare the files that MODELs were loaded from with those that an ensemble was made with.

    prompt: of ComfyUI: node -> class_type and inputs
    node:   AFA Ensemble
    inputs: its connected MODELs, in order
    folder: of the ensemble
    paths:  ComfyUI's module folder_paths
    Returns a sentence for each MODEL; what differs is warned about. Raises UserError for another order.
    """
    entries = read_manifest(folder).experts
    told = []
    for place, (name, entry) in enumerate(zip(inputs, entries, strict=True), start=1):
        file, loras = _origin(prompt, prompt[node]["inputs"].get(name), paths)
        told.append(f"{place} {entry.name}: {_compared(file, loras, entry, entries, place)}")
    return told


def _compared(
    file: Path | None, loras: int, entry: ExpertEntry, entries: Sequence[ExpertEntry], place: int
) -> str:
    if file is None or not file.is_file():
        return "not compared, since its file is not known"
    digest = sha256(file)
    if digest not in entry.files.values():
        other = next((one.name for one in entries if digest in one.files.values()), None)
        if other is not None:
            raise UserError(
                f"MODEL {place} is expert '{other}' ({file.name}), expected '{entry.name}'; connect the "
                f"MODELs in the ensemble's order: {', '.join(one.name for one in entries)}"
            )
        recorded = next(iter(entry.files.values()), "unknown")
        told = f"{file.name} has sha256 {digest}, the ensemble was made with {recorded}"
    elif bool(loras) != bool(entry.loras):
        told = f"{loras} LoRAs are on {file.name}, the ensemble was made with {len(entry.loras)}"
    else:
        return f"{file.name}, the file of the training"
    log.warning("MODEL %d (%s): %s", place, entry.name, told)
    return told


def _origin(prompt: Mapping[str, Any], link: Any, paths: Any) -> tuple[Path | None, int]:
    """Follow a MODEL back to its loader: -> the file it names, and the number of LoRAs on the way."""
    loras, seen = 0, set()
    while isinstance(link, (list, tuple)) and link and link[0] in prompt and link[0] not in seen:
        seen.add(link[0])
        inputs = prompt[link[0]].get("inputs", {})
        loras += "lora_name" in inputs
        for name, kind in FILES.items():
            if isinstance(inputs.get(name), str):
                found = paths.get_full_path(kind, inputs[name])
                return (None if found is None else Path(found)), loras
        link = inputs.get("model")
    return None, loras
