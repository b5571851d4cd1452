"""An expert without its weights: models on the meta device, and files that are checked by their headers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.expert import TEXT_ENCODERS, TOKENIZERS, Expert
from afa.experts.folders import read_config, read_folder
from afa.experts.headers import Tensors, check_fit, dtype_of, read_file, same_bytes
from afa.experts.layouts import DENOISER
from afa.experts.locate import Located, locate
from afa.experts.parts import (
    check_config,
    component_class,
    component_of,
    first_line,
    has_part,
    load_part,
    read_index,
)
from afa.experts.prediction import Prediction, flow_only, folder_scheduler, says
from afa.experts.single_file import as_diffusers, config_folder, config_of, load_tokenizers, scheduler_of
from afa.experts.spec import ExpertSpec
from afa.models.registry import FAMILIES, family_of
from afa.text_encoder import arithmetic

# Where the components lie in a single file of original layout (SD 1.x and 2.x; SDXL).
PREFIXES = {
    "unet": (DENOISER,),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
    "vae": ("first_stage_model.",),
}
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.")


@dataclass
class Outline:
    """An expert as its files describe it.

    expert: can be compared, counted and measured, not run. parts: its models by component (unet,
    text_encoder, vae …).
    stored: what the files hold for a component; nothing for bare configs, and where a LoRA may change it.
    config: the one a single file was read with; folder: where that lies.
    """

    expert: Expert
    parts: dict[str, nn.Module]
    stored: dict[str, Tensors] = field(default_factory=dict)
    config: str | None = None
    folder: Path | None = None

    @property
    def dtype(self) -> str | None:
        """Of the denoiser in its file."""
        return dtype_of(self.stored.get(self.denoiser))

    @property
    def denoiser(self) -> str:
        """The denoiser's name among the parts."""
        return next(name for name, part in self.parts.items() if part is self.expert.model)

    @property
    def text_parts(self) -> list[str]:
        """The text encoders' names among the parts, in the pipeline's order."""
        return [name for name in TEXT_ENCODERS if name in self.parts]


def read_outline(spec: ExpertSpec, config: str | None = None) -> Outline:
    """Describe an expert from its files. config: as in load_expert.

    Raises UserError if it cannot be found, its files are broken, cut off or incomplete, or it cannot be an
    expert.
    """
    located = locate(spec)
    try:
        found = _from_single_file(located, config) if located.single_file else _from_folder(located)
        _check_loras(found, located)
        FAMILIES[family_of(found.expert.model)].stages(found.expert.model)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"expert '{spec.name}': {error}") from None
    return found


def config_outline(name: str, config: str) -> Outline:
    """An expert of a shipped architecture, without any files of its own."""
    folder = config_folder(config)
    found = _described(name, folder, _build_all(folder), {})
    found.config = config
    return found


def _from_folder(located: Located) -> Outline:
    name, path = located.spec.name, located.path
    if not located.whole_pipeline:
        model = _build(path, None, "diffusers", str(read_config(path).get("_class_name", "")))
        said = Prediction(located.spec.prediction_type)
        found = Outline(
            Expert(name=name, model=model, located=located, said=said),
            {FAMILIES[family_of(model)].component: model},
        )
    else:
        found = _described(name, path, _build_all(path), {})
        found.expert.located, index = located, read_index(path)
        found.expert.scheduler = folder_scheduler(located, index)
        found.expert.tokenizers = [load_part(path, part) for part in TOKENIZERS if has_part(index, part)]
    for part, model in found.parts.items():
        folder = path / part if located.whole_pipeline else path
        tensors = read_folder(folder)
        check_fit(model, {key: entry.meta() for key, entry in tensors.items()}, str(folder))
        found.stored[part] = tensors
    return found


def _from_single_file(located: Located, config: str | None) -> Outline:
    tensors = read_file(located.path)
    name, folder = config_of(located, config)
    if not located.whole_pipeline:
        return _from_denoiser_file(located, config, tensors)
    parts = _build_all(folder)
    stored = {
        part: {key: entry for key, entry in tensors.items() if key.startswith(PREFIXES[part])}
        for part in parts
    }
    if "vae" in stored and not stored["vae"]:  # allowed: another expert may have the VAE for all
        del stored["vae"], parts["vae"]
    for part, entries in stored.items():
        _check_original(
            part, parts[part], entries, f"the {part} in {located.path} (read with the config {folder.name})"
        )
    found = _described(located.spec.name, folder, parts, stored)
    found.expert.located, found.config, found.folder = located, name, folder
    found.expert.scheduler, found.expert.said = scheduler_of(located, config, folder)
    found.expert.tokenizers = list(load_tokenizers(folder).values())
    return found


def _from_denoiser_file(located: Located, config: str | None, tensors: Tensors) -> Outline:
    """A denoiser alone; what else its file may hold is not read. A flow's scheduler is its lender's."""
    name, folder = config_of(located, config)
    index = read_index(folder)
    part = component_of(folder, index)
    model = _build(folder / part, part, *index[part])
    layout = located.layout
    entries = {
        key: entry for key, entry in tensors.items() if key.startswith(layout.prefix) and not says(key)
    }
    where = f"the {part} in {located.path} (read with the config {folder.name})"
    if layout.part == "unet":
        check_fit(
            model,
            as_diffusers(model, layout, {key: entry.meta() for key, entry in entries.items()}, where),
            where,
        )
    else:
        _check_original(part, model, entries, where)
    scheduler, said = (
        scheduler_of(located, config, folder) if layout.part == "unet" else (None, flow_only(located))
    )
    expert = Expert(name=located.spec.name, model=model, scheduler=scheduler, located=located, said=said)
    return Outline(expert, {part: model}, {part: entries}, name, folder)


def _check_original(part: str, model: nn.Module, entries: Tensors, where: str) -> None:
    """Rename a component's tensors as diffusers will, and check that they fill its model."""
    try:
        renamed = _as_diffusers(part, model, {key: entry.meta() for key, entry in entries.items()})
    except (KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where} is incomplete or of another architecture ({type(error).__name__}: {error}); "
            "download or export it again"
        ) from None
    check_fit(model, renamed, where)


def _as_diffusers(part: str, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders import single_file_utils as original

    if part not in TEXT_ENCODERS:
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        return dict(
            SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"](
                checkpoint=tensors, config=model.config
            )
        )
    for prefix in OPEN_CLIP:
        if any(key.startswith(prefix) for key in tensors):
            return dict(original.convert_open_clip_checkpoint(model, tensors, prefix=prefix))
    return dict(original.convert_ldm_clip_checkpoint(tensors))


def _described(name: str, folder: Path, parts: dict[str, nn.Module], stored: dict[str, Tensors]) -> Outline:
    """The outline of a pipeline folder's (or a config's) components."""
    index = read_index(folder)
    expert = Expert(
        name=name,
        model=parts[component_of(folder, index)],
        text_encoders=[parts[part] for part in TEXT_ENCODERS if part in parts],
        scheduler=load_part(folder, "scheduler") if has_part(index, "scheduler") else None,
        vae=parts.get("vae"),
        pipeline=index.get("_class_name"),
    )
    return Outline(expert, parts, stored)


def _build_all(folder: Path) -> dict[str, nn.Module]:
    """Denoiser, text encoders and VAE of a pipeline folder, as far as it has them.

    A VAE may be left out of a download.
    """
    index = read_index(folder)
    names = [component_of(folder, index), *(name for name in TEXT_ENCODERS if has_part(index, name))]
    names += ["vae"] if has_part(index, "vae") and (folder / "vae").is_dir() else []
    return {name: _build(folder / name, name, *index[name]) for name in names}


def _build(folder: Path, part: str | None, library: str, name: str) -> nn.Module:
    """A model of the class and the config of a component's folder, on the meta device.

    part: as component_class takes it.
    """
    from diffusers.models.modeling_utils import no_init_weights

    maker = component_class(folder, part, library, name)
    config = check_config(folder, library, name)
    try:
        with torch.device("meta"), no_init_weights():
            model: nn.Module = (
                maker(maker.config_class.from_dict(config))
                if library == "transformers"
                else maker.from_config(config)
            )
    except Exception as error:  # the libraries raise anything for settings of a wrong type
        raise UserError(f"{folder / 'config.json'} makes no {name}: {first_line(error)}") from None
    return model.eval()


def _check_loras(found: Outline, located: Located) -> None:
    """LoRA files must be whole, and have a pipeline to join.

    An encoder that they may change is no longer its file's.
    """
    spec = located.spec
    if spec.loras and not located.whole_pipeline:
        raise UserError(
            f"expert '{spec.name}': a LoRA needs a whole pipeline to join, "
            f"and {located.path} is only a denoiser"
        )
    for lora in spec.loras:
        names = read_file(Path(lora.path)) if Path(lora.path).suffix == ".safetensors" else {}
        if not names or any("lora_te" in name or "text_encoder" in name for name in names):
            for part in found.text_parts:
                found.stored.pop(part, None)


def shared_text_encoders(outlines: list[Outline]) -> list[list[str | None]]:
    """For each text encoder of each expert, name the first expert with an equal one; None if it is the first.

    The same is: equal bit for bit in the files, with equal settings; an ensemble keeps and runs such encoders
    once. Files are read until their first difference. Of bare configs: in families whose fine-tunes leave the
    text encoders alone.
    """
    return [
        [_same_as(outlines[:index], mine, part) for part in mine.text_parts]
        for index, mine in enumerate(outlines)
    ]


def _same_as(earlier: list[Outline], mine: Outline, part: str) -> str | None:
    frozen = mine.expert.located is None and FAMILIES[mine.expert.family].call.frozen_text
    for other in earlier:
        if frozen and other.config == mine.config:
            return other.expert.name
        known = (
            part in mine.stored
            and part in other.stored
            and arithmetic(mine.parts[part]) == arithmetic(other.parts[part])
        )
        if known and same_bytes(other.stored[part], mine.stored[part]):
            return other.expert.name
    return None
