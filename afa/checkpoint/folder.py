"""The folder of a saved ensemble: written as a whole, and read with checks."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors.torch import save_file

from afa.aggregators.registry import count_parameters
from afa.checkpoint.aggregator_files import check_file, fill, read_tensors
from afa.checkpoint.card import model_card
from afa.checkpoint.manifest import (
    AGGREGATORS,
    MANIFEST,
    TEXT_ENCODERS,
    AggregatorEntry,
    ExpertEntry,
    Manifest,
    TrainingRecord,
    check_hashes,
    entry_for,
    frame_places,
    is_pinned,
    public_record,
    read_manifest,
    recipe_of,
    relative,
)
from afa.checkpoint.release import write_release
from afa.checkpoint.sources import Given, find_experts
from afa.denoiser.schedule import kind_of
from afa.errors import UserError
from afa.experts.donor import files_of
from afa.experts.expert import Expert
from afa.experts.folders import forget_places
from afa.experts.locate import Located, hash_expert, locate
from afa.experts.parts import component_of, read_index
from afa.experts.prediction import said_by_file
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.spec import PREDICTION_TYPES, ExpertSpec, Lora
from afa.files import sha256, staged
from afa.frame import stock_pipeline
from afa.version import __version__

if TYPE_CHECKING:
    from afa.ensemble import Ensemble


def save_ensemble(ensemble: "Ensemble", folder: Path, *, bundle: bool) -> None:
    """See Ensemble.save."""
    _check_target(folder)
    with staged(folder, last=MANIFEST) as stage:
        tensors = {name: tensor.contiguous() for name, tensor in ensemble.aggregators.state_dict().items()}
        save_file(tensors, stage / AGGREGATORS, metadata={"format": "pt", "afa": __version__})
        copied: dict[Path, Path] = {}
        entries = [
            _bundle(expert, stage, copied) if bundle else _refer(expert, folder)
            for expert in ensemble.experts
        ]
        choices = _choices(ensemble)
        frame = {
            part: _frame(part, choice, ensemble, folder, stage if bundle else None)
            for part, choice in choices.items()
        }
        manifest = _manifest(ensemble, entries, frame, sha256(stage / AGGREGATORS))
        if bundle:  # made to be shared; a save that refers to experts may be gone on with here
            manifest.training = public_record(manifest.training)
            forget_places(stage / "frame")
            forget_places(stage / "config")
        (stage / "README.md").write_text(model_card(manifest))
        (stage / MANIFEST).write_text(manifest.to_json())


def _check_target(folder: Path) -> None:
    """Raise UserError for a folder of a model: an ensemble only replaces an ensemble."""
    for mark in ("model_index.json", "config.json"):
        if (folder / mark).exists() and not (folder / MANIFEST).exists():
            raise UserError(f"{folder} holds a model ({mark}); save the ensemble into a folder of its own")


def _choices(ensemble: "Ensemble") -> dict[str, str]:
    """The parts of the frame: what was chosen for each, and what the donor is made of."""
    donor = ensemble.frame.donor
    if donor is None:
        return dict(ensemble.frame.choice)
    vae = donor.vae_component
    own = vae is not None and vae.weights in files_of(ensemble.experts)
    # What is in the experts' files, and configs that ship, are found again by the experts.
    found = {
        part: choice
        for part, choice in ensemble.frame.choice.items()
        if choice != donor.name or not (donor.located is None or (own and part == "vae"))
    }
    return found | ({} if donor.located is None else {"frame": donor.name}) | donor.donor_files


def _frame(part: str, choice: str, ensemble: "Ensemble", folder: Path, stage: Path | None) -> str:
    """A part of the frame for the manifest.

    part:   vae, tokenizer, scheduler or frame
    choice: an expert's name, or a path
    folder: of the ensemble
    stage:  the folder that it is staged in, for a bundle; None: paths are not copied
    Returns the expert's name, or a path relative to the folder.
    """
    if choice in ensemble.names:
        return choice
    donor = ensemble.frame.donor
    lent = donor.located if donor is not None and choice == donor.name else None
    if stage is None:
        hub = lent is not None and lent.commit is not None
        return f"{lent.spec.source}@{lent.commit}" if lent and hub else relative(Path(choice), folder)
    if lent is not None:  # several parts of one folder
        return _copy_donor(lent.path, stage / "frame" / "pipeline").relative_to(stage).as_posix()
    copied = _copy(Path(choice), stage / "frame" / part)
    return copied.relative_to(stage).as_posix()


def _copy_donor(source: Path, target: Path) -> Path:
    """Copy a pipeline's folder, once, without its denoiser, which the ensemble does not use."""
    if not target.exists():
        denoiser = component_of(source, read_index(source))
        shutil.copytree(
            source, target, ignore=lambda place, names: [denoiser] if Path(place) == source else []
        )
    return target


def _copy(source: Path, target: Path) -> Path:
    """Copy a file or a folder to `target`; a file keeps its suffix. Returns the copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        return Path(shutil.copytree(source, target, dirs_exist_ok=True))
    return Path(shutil.copy2(source, target.with_name(f"{target.name}{source.suffix}")))


def _manifest(
    ensemble: "Ensemble", entries: list[ExpertEntry], frame: dict[str, str], digest: str
) -> Manifest:
    denoiser = ensemble.denoiser
    aggregator: AggregatorEntry = {
        "kind": denoiser.recipe.kind,
        "options": dict(denoiser.recipe.options),
        "attention_up_to": denoiser.recipe.attention_up_to,
        "text_stream": cast(Literal["own", "fused"], denoiser.recipe.text_stream),
        "parameters": count_parameters(denoiser.aggregators),
        "sha256": digest,
    }
    if denoiser.recipe.shared_guidance:
        aggregator["shared_guidance"] = True
    return Manifest(
        family=denoiser.family,
        experts=entries,
        frame=frame,
        placement=denoiser.placement if isinstance(denoiser.placement, str) else list(denoiser.placement),
        stages=[
            {
                "name": stage.name,
                "channels": stage.channels,
                "level": stage.level,
                "fused": stage.name in denoiser.aggregators,
            }
            for stage in denoiser.stages
        ],
        aggregator=aggregator,
        training=cast(TrainingRecord | None, ensemble.training),
        afa_version=__version__,
    )


def _prediction_type(expert: Expert) -> str | None:
    return None if expert.scheduler is None else kind_of(expert.scheduler)


def _check_prediction_type(expert: Expert, entry: ExpertEntry) -> None:
    """Raise UserError if an expert's scheduler has another kind of prediction than at saving."""
    found = _prediction_type(expert)
    if entry.prediction_type is not None and found != entry.prediction_type:
        raise UserError(
            f"expert '{expert.name}' has changed: its scheduler says prediction_type {found}, "
            f"the ensemble was made with {entry.prediction_type};"
            " restore its scheduler_config.json or train again"
        )


def _refer(expert: Expert, folder: Path) -> ExpertEntry:
    """The entry of an expert that stays where it is. Raises UserError for one that is in memory only."""
    if expert.located is None:
        raise UserError(
            f"expert '{expert.name}' was given as an object and has no place to refer to; "
            "save with bundle=True to copy it in"
        )
    if not expert.hashes:
        expert.hashes = hash_expert(expert.located)
    return entry_for(expert.located, folder, expert.hashes, expert.config, _prediction_type(expert))


def _bundle(expert: Expert, stage: Path, copied: dict[Path, Path]) -> ExpertEntry:
    """Copy an expert into a bundle; its LoRAs stay separate files, and their base is copied once.

    stage:  the folder that the ensemble is staged in
    copied: source -> copy, of the experts before
    """
    target = stage / "experts" / expert.name
    config = expert.config
    if expert.located is None:
        save_expert(expert, target)
        located = Located(ExpertSpec(expert.name, str(target)), target)
    else:
        located = _copy_files(expert.located, target, copied)
        if config is not None and config not in KNOWN_CONFIGS:
            config = str(_copy(Path(config), stage / "config"))
    forget_places(target)
    return entry_for(located, stage, hash_expert(located), config, _prediction_type(expert))


def _copy_files(located: Located, target: Path, copied: dict[Path, Path]) -> Located:
    loras = tuple(
        Lora(str(_copy(Path(lora.path), target.with_name(f"{target.name}-lora{index}"))), lora.strength)
        for index, lora in enumerate(located.spec.loras)
    )
    source = located.path.resolve()
    path = copied[source] = copied.get(source) or _copy(located.path, target)
    return Located(ExpertSpec(located.spec.name, str(path), None, loras), path)


def save_expert(expert: Expert, target: Path) -> None:
    """Write an expert that was given as an object, as a diffusers folder."""
    if getattr(expert.model, "peft_config", None):
        raise UserError(
            f"expert '{expert.name}' has a LoRA loaded beside its weights; "
            "call pipe.fuse_lora() and pipe.unload_lora_weights() before saving"
        )
    if not expert.text_encoders or expert.donor is not None:
        expert.model.save_pretrained(target)
        return
    stock_pipeline(expert).save_pretrained(target)


def load_ensemble(
    kind: "type[Ensemble]", folder: Path, moved: Given, *, dtype: torch.dtype | None, verify: bool
) -> "Ensemble":
    """See Ensemble.load."""
    manifest = read_manifest(folder)
    check_file(folder, manifest)
    specs = find_experts(manifest, folder, moved)
    frame_places(manifest, folder)
    specs = [
        _with_recorded_prediction(entry, spec) for entry, spec in zip(manifest.experts, specs, strict=True)
    ]
    if verify:
        for entry, spec in zip(manifest.experts, specs, strict=True):
            check_hashes(entry, locate(spec))
    ensemble = _make(kind, manifest, specs, folder, dtype)
    fill(ensemble.denoiser.aggregators, read_tensors(folder), folder)
    ensemble.training = None if manifest.training is None else {**manifest.training}
    for expert, entry in zip(ensemble.experts, manifest.experts, strict=True):
        _check_prediction_type(expert, entry)
        expert.hashes = entry.files if verify else {}
    return ensemble


def _make(
    kind: "type[Ensemble]",
    manifest: Manifest,
    specs: list[ExpertSpec],
    folder: Path,
    dtype: torch.dtype | None,
) -> "Ensemble":
    """The ensemble of a manifest, with untrained aggregators. Raises UserError if its stages are others."""
    configs = [entry.config_in(folder) for entry in manifest.experts]
    recipe = recipe_of(manifest)
    places: dict[str, Any] = frame_places(manifest, folder)
    if is_pinned(places.get("frame", ""), folder):
        print(
            f"afa: {folder / MANIFEST} names {places['frame']} of the hub as frame: its configs and "
            "tokenizers are fetched, unless they are here already",
            file=sys.stderr,
        )
    ensemble = kind.from_experts(
        specs,
        placement=manifest.placement,
        aggregator=recipe.kind,
        attention_up_to=recipe.attention_up_to,
        text_stream=recipe.text_stream,
        dtype=dtype,
        config=next((config for config in configs if config), None),
        text_encoders=[places.pop(name) for name in TEXT_ENCODERS if name in places],
        **places,
        **recipe.options,
    )
    ensemble.denoiser.share_guidance_weights = recipe.shared_guidance
    fused = ensemble.denoiser.fused
    made = [(stage.name, stage.channels, stage.name in fused) for stage in ensemble.denoiser.stages]
    if made != [(stage["name"], stage["channels"], stage["fused"]) for stage in manifest.stages]:
        raise UserError(
            f"{folder / MANIFEST} has other stages than its experts; they belong to another architecture"
        )
    return ensemble


def _with_recorded_prediction(entry: ExpertEntry, spec: ExpertSpec) -> ExpertSpec:
    """The spec with the recorded kind of prediction, for a U-Net's single file that does not say it."""
    if entry.prediction_type not in PREDICTION_TYPES:
        return spec
    located = locate(spec)
    if not located.single_file or located.layout.part == "transformer" or said_by_file(located.path).type:
        return spec
    return replace(spec, prediction_type=entry.prediction_type)


def export_release(ensemble: "Ensemble", folder: Path) -> None:
    """See Ensemble.export_release."""
    denoiser = ensemble.denoiser
    with staged(folder, last="aggregator_0") as stage:
        write_release(
            stage,
            denoiser.aggregators,
            denoiser.stages,
            denoiser.recipe,
            denoiser.widths,
            len(denoiser.experts),
        )
