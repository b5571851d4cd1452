"""From specs to loaded experts; equal components are loaded once, a denoiser alone borrows the rest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.errors import UserError
from afa.experts.expert import TEXT_ENCODERS, TOKENIZERS, Expert, check_whole, pipeline_options
from afa.experts.folders import read_config, read_folder
from afa.experts.headers import Tensors, check_finite, same_bytes
from afa.experts.locate import Located, locate
from afa.experts.lora import add_own, fuse, load_sharing
from afa.experts.parts import component_of, first_line, has_part, load_part, read_index
from afa.experts.prediction import Prediction, flow_only, folder_scheduler, predicting
from afa.experts.single_file import config_of, load_tokenizers, read_component, scheduler_of
from afa.experts.spec import ExpertSpec
from afa.models.registry import FAMILIES


@dataclass
class KnownParts:
    """What has been loaded so far, with what its files hold."""

    parts: list[tuple[str, torch.dtype | None, str, Tensors, nn.Module]] = field(default_factory=list)

    def find(self, folder: Path, dtype: torch.dtype | None) -> nn.Module | None:
        """A module that was loaded from equal files: the same config, the same weights bit for bit.

        None if there is none.

        Weight files are read until their first difference, and kept by nobody.
        """
        settings, tensors = _read(folder)
        for known, other, kind, stored, module in self.parts:
            if (known, other, kind) == (folder.name, dtype, settings) and same_bytes(stored, tensors):
                return module
        return None

    def add(self, folder: Path, dtype: torch.dtype | None, module: nn.Module) -> None:
        """Remember a module for those that follow."""
        settings, tensors = _read(folder)
        self.parts.append((folder.name, dtype, settings, tensors, module))


def _read(folder: Path) -> tuple[str, Tensors]:
    """-> the settings as text, the tensors."""
    return json.dumps(read_config(folder), sort_keys=True), read_folder(folder)


def load_expert(
    source: object,
    dtype: torch.dtype | None = None,
    config: str | None = None,
    known: KnownParts | None = None,
) -> Expert:
    """Make an expert from a string (see ExpertSpec), a spec, a pipeline, a bare denoiser or an Expert.

    config: for a single file, the name of a shipped config or a folder of configs; found out by default.
    known: parts of other experts, of which equal ones are taken instead of being loaded again.
    Raises UserError if it cannot be found, read, or be an expert, or if its weights hold NaN or infinity.
    """
    if isinstance(source, Expert):
        return source
    if isinstance(source, (str, Path)):
        source = ExpertSpec.parse(str(source))
    if isinstance(source, ExpertSpec):
        expert = _from_files(locate(source), dtype or torch.float32, config, known or KnownParts())
    elif isinstance(source, nn.Module):
        expert = Expert(name="", model=source)
    elif hasattr(source, "components"):
        expert = _from_pipeline(source)
    else:
        raise UserError(
            f"a {type(source).__name__} cannot be an expert; give a path, a hub id, "
            "a diffusers pipeline or a denoiser"
        )
    where = f"the expert given as a {type(source).__name__}"
    if isinstance(source, ExpertSpec):
        where = f"expert '{source.name}' ({str(source).partition('=')[2]})"
    for module in (expert.model, *expert.text_encoders):
        check_finite(module, f"{where}, {type(module).__name__}")
    return expert


def load_experts(
    sources: Sequence[object],
    dtype: torch.dtype | None = None,
    config: str | None = None,
    prediction_type: str | None = None,
) -> list[Expert]:
    """Load several, and give every one a name of its own; those on one base share its weights (see adapters).

    Raises UserError for two of one name, before loading.
    """
    specs = [
        ExpertSpec.parse(str(source), prediction_type) if isinstance(source, (str, Path)) else source
        for source in sources
    ]
    check_names([spec for spec in specs if isinstance(spec, ExpertSpec)])
    known = KnownParts()
    experts = load_sharing(specs, lambda source: load_expert(source, dtype, config, known))
    for index, expert in enumerate(experts):
        expert.name = expert.name or f"expert_{index}"
    return experts


def check_names(specs: Sequence[ExpertSpec]) -> None:
    """Raises UserError if two experts have one name."""
    named = [(spec.name, str(spec)) for spec in specs]
    for index, (name, text) in enumerate(named):
        for earlier, other in named[:index]:
            if earlier == name:
                raise UserError(
                    f"two experts are called '{name}' ({other} and {text}); name them, e.g. "
                    f"first={other.partition('=')[2]}"
                )


def _from_pipeline(pipe: Any) -> Expert:
    """The expert in a pipeline that is already built, LoRAs and all."""
    components = pipe.components
    component = next(
        (family.component for family in FAMILIES.values() if components.get(family.component) is not None),
        None,
    )
    if component is None:
        raise UserError(f"a {type(pipe).__name__} has no denoiser that can be an expert")
    return Expert(
        name="",
        model=components[component],
        text_encoders=[components[name] for name in TEXT_ENCODERS if components.get(name) is not None],
        tokenizers=[components[name] for name in TOKENIZERS if components.get(name) is not None],
        scheduler=pipe.scheduler,
        vae=components.get("vae"),
        pipeline=type(pipe).__name__,
        pipeline_options=pipeline_options(dict(pipe.config)),
    )


def _from_files(located: Located, dtype: torch.dtype, config: str | None, known: KnownParts) -> Expert:
    spec = located.spec
    if not located.whole_pipeline:
        if spec.loras:
            raise UserError(
                f"expert '{spec.name}': a LoRA needs a whole pipeline to join, "
                f"and {located.path} is only a denoiser"
            )
        if located.single_file:
            return _denoiser_file(located, dtype, config)
        said = Prediction(spec.prediction_type)
        return Expert(name=spec.name, model=load_part(located.path, None, dtype), located=located, said=said)
    if located.single_file:
        return _from_single_file(located, dtype, config)
    index = read_index(located.path)
    known = KnownParts() if spec.loras else known  # text encoders that a LoRA changes are shared with nobody
    expert = Expert(
        name=spec.name,
        model=load_part(located.path, component_of(located.path, index), dtype),
        text_encoders=[
            _load_known(known, located.path, name, dtype) for name in TEXT_ENCODERS if has_part(index, name)
        ],
        tokenizers=[load_part(located.path, name) for name in TOKENIZERS if has_part(index, name)],
        scheduler=folder_scheduler(located, index),
        pipeline=index["_class_name"],
        pipeline_options=pipeline_options(index),
        located=located,
    )
    return _fuse_loras(expert)


def _load_known(known: KnownParts, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A component that may have been loaded from equal files before."""
    if not (folder / part / "config.json").is_file():
        return load_part(folder, part, dtype)  # which says what is wrong
    module = known.find(folder / part, dtype)
    if module is None:
        module = load_part(folder, part, dtype)
        known.add(folder / part, dtype, module)
    return module


def _denoiser_file(located: Located, dtype: torch.dtype, config: str | None) -> Expert:
    """A denoiser alone, whatever else its file holds."""
    import diffusers

    _, folder = config_of(located, config)
    index = read_index(folder)
    part = component_of(folder, index)
    maker = getattr(diffusers, index[part][1])
    if located.layout.part == "unet":
        model = read_component(
            located.path,
            located.layout,
            maker,
            maker.load_config(folder / part, local_files_only=True),
            dtype,
        )
        said = scheduler_of(located, config, folder)[1]
        return Expert(name=located.spec.name, model=model, located=located, config=config, said=said)
    options = {"config": str(folder), "subfolder": part, "local_files_only": True, "dtype": dtype}
    try:
        model = maker.from_single_file(str(located.path), **options).eval()
    except Exception as error:
        raise UserError(
            f"{located.path} could not be read with the config {folder.name}: {first_line(error)}"
        ) from error
    check_whole(located, folder, {part: model})
    return Expert(
        name=located.spec.name, model=model, located=located, config=config, said=flow_only(located)
    )


def _from_single_file(located: Located, dtype: torch.dtype, config: str | None) -> Expert:
    """Load the expert in a single file by a stock pipeline; its VAE is read later."""
    import diffusers

    _, folder = config_of(located, config)
    maker = getattr(diffusers, read_index(folder)["_class_name"])
    options = {
        "config": str(folder),
        "local_files_only": True,
        "dtype": dtype,
        "vae": None,
        **load_tokenizers(folder),
    }
    try:
        pipe = maker.from_single_file(str(located.path), **options)
    except Exception as error:  # the library raises anything for what it did not expect
        raise UserError(
            f"{located.path} could not be read with the config {folder.name}: {first_line(error)}"
        ) from error
    check_whole(located, folder, pipe.components)
    expert = _from_pipeline(pipe)
    expert.name, expert.located, expert.config = located.spec.name, located, config
    expert.scheduler, expert.said = scheduler_of(located, config, folder)
    return _fuse_loras(expert)


def _fuse_loras(expert: Expert) -> Expert:
    """Add the LoRA files that an expert was given with to its weights."""
    assert expert.located is not None
    if expert.located.spec.loras:
        add_own(expert, expert.located.spec.loras)
        for module in (expert.model, *expert.text_encoders):
            fuse(module)
    return expert


def lend(experts: Sequence[Expert], frame: str | None, dtype: torch.dtype | None) -> Expert | None:
    """Give text encoders, tokenizers and scheduler to bare denoisers; return their owner, or None.

    frame: a pipeline's folder; by default the first expert that brings text encoders lends them. Where nobody
    has any, the experts stay bare denoisers. Raises UserError for a frame that is no pipeline's folder, or
    that nobody needs.
    """
    bare = [expert for expert in experts if not expert.text_encoders]
    if frame is not None and not bare:
        raise UserError(
            f"frame '{frame}' lends to experts that are denoisers alone, and all of these bring their own; "
            "leave it out, or choose another VAE with vae (--vae)"
        )
    lender = (
        next((expert for expert in experts if expert.text_encoders), None)
        if frame is None
        else load_lender(frame, dtype)
    )
    if lender is None or not bare:
        return None
    for expert in bare:
        expert.lender, expert.text_encoders, expert.tokenizers = (
            lender,
            list(lender.text_encoders),
            list(lender.tokenizers),
        )
        expert.scheduler = expert.scheduler or lent_scheduler(expert, lender.scheduler)
        expert.pipeline_options = dict(lender.pipeline_options)
    return lender


def lent_scheduler(expert: Expert, scheduler: Any) -> Any:
    """A lender's scheduler, for what an expert's own file says that it predicts."""
    return None if scheduler is None else predicting(scheduler, expert.said, f"expert '{expert.name}'")


def frame_scheduler(frame: str) -> Any:
    """The scheduler that a pipeline's folder lends. Raises UserError if it is none."""
    return load_part(_pipeline(frame)[0], "scheduler")


def _pipeline(frame: str) -> tuple[Path, dict[str, Any]]:
    folder = Path(frame)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"frame '{frame}' is no pipeline's folder: it has no model_index.json")
    return folder, read_index(folder)


def load_lender(frame: str, dtype: torch.dtype | None) -> Expert:
    """A pipeline's folder without its denoiser. Raises UserError if it is none, or has no text encoders."""
    folder, index = _pipeline(frame)
    found = [part for part in TEXT_ENCODERS if has_part(index, part)]
    if not found:
        raise UserError(
            f"frame '{frame}' has no text encoders; give the folder of a whole text-to-image pipeline"
        )
    encoders = [load_part(folder, part, dtype or torch.float32) for part in found]
    for part, encoder in zip(found, encoders, strict=True):
        check_finite(encoder, f"the {part} of frame '{frame}'")
    return Expert(
        name=frame,
        model=None,
        text_encoders=encoders,
        tokenizers=[load_part(folder, part) for part in TOKENIZERS if has_part(index, part)],
        scheduler=load_part(folder, "scheduler"),
        pipeline=index["_class_name"],
        located=Located(ExpertSpec(frame, frame), folder),
    )
