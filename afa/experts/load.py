"""From specs to loaded experts. Equal components are loaded once; a denoiser alone borrows the others."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.errors import UserError
from afa.experts.component import Component
from afa.experts.description import ExpertDescription, describe, pipeline_components
from afa.experts.expert import TEXT_ENCODERS, Expert, pipeline_options, tokenizers_in
from afa.experts.headers import check_finite
from afa.experts.locate import Located, locate
from afa.experts.lora import load_sharing
from afa.experts.lora_differences import fold_in
from afa.experts.parts import load_part, load_tokenizers_of, read_index
from afa.experts.prediction import predicting
from afa.experts.spec import ExpertSpec
from afa.models.registry import FAMILIES


class ComponentCache:
    """Components that have been loaded, so that equal ones of other experts are not loaded again."""

    def __init__(self) -> None:
        self._loaded: list[tuple[Component, torch.dtype, nn.Module]] = []

    def load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        """Load a component, or take one that was loaded from equal files, bit for bit."""
        for known, its_dtype, module in self._loaded:
            if its_dtype == dtype and known.same_as(component):
                return module
        module = component.load(dtype)
        self._loaded.append((component, dtype, module))
        return module


def load_expert(
    source: object,
    dtype: torch.dtype | None = None,
    config: str | None = None,
    cache: ComponentCache | None = None,
) -> Expert:
    """Make an expert.

    source: a string (see ExpertSpec), a spec, a pipeline, a denoiser or an Expert
    dtype:  of its weights; None: float32
    config: of a single file, the name of a shipped config or a folder of configs; None: detected
    cache:  text encoders of other experts
    Raises UserError if it cannot be found, read, or be an expert, or if its weights hold NaN or infinity.
    """
    if isinstance(source, Expert):
        return source
    if isinstance(source, (str, Path)):
        source = ExpertSpec.parse(str(source))
    if isinstance(source, ExpertSpec):
        expert = _from_files(
            describe(locate(source), config), dtype or torch.float32, cache or ComponentCache()
        )
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
        _align(module)
        check_finite(module, f"{where}, {type(module).__name__}")
    return expert


def _align(module: nn.Module) -> None:
    """Copy weights at odd addresses, as those of a memory-mapped file.

    Some kernels round by the address of their operands: equal weights would predict other last bits.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % 64:  # torch's own allocations begin at multiples of 64 bytes
            tensor.data = tensor.data.clone()


def load_experts(
    sources: Sequence[object],
    dtype: torch.dtype | None = None,
    config: str | None = None,
    prediction_type: str | None = None,
) -> list[Expert]:
    """Load several experts. Those that are one base with different LoRAs share its weights.

    sources:         as load_expert takes them; a string may name the expert
    dtype, config:   as in load_expert
    prediction_type: epsilon or v_prediction, for U-Nets in single files that do not say it
    Returns the experts, each with a name. Raises UserError for two of one name, before loading.
    """
    specs = [
        ExpertSpec.parse(str(source), prediction_type) if isinstance(source, (str, Path)) else source
        for source in sources
    ]
    check_names([spec for spec in specs if isinstance(spec, ExpertSpec)])
    cache = ComponentCache()
    experts = load_sharing(specs, lambda source: load_expert(source, dtype, config, cache))
    for index, expert in enumerate(experts):
        expert.name = expert.name or f"expert_{index}"
    return experts


def check_names(specs: Sequence[ExpertSpec]) -> None:
    """Raise UserError if two experts have one name."""
    named = [(spec.name, str(spec)) for spec in specs]
    for index, (name, text) in enumerate(named):
        for earlier, other in named[:index]:
            if earlier == name:
                raise UserError(
                    f"two experts are called '{name}' ({other} and {text}); name them, e.g. "
                    f"first={other.partition('=')[2]}"
                )


def _from_pipeline(pipe: Any) -> Expert:
    """The expert in a pipeline object, with the LoRAs that are loaded in it."""
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
        tokenizers=tokenizers_in(components),
        scheduler=pipe.scheduler,
        vae=components.get("vae"),
        pipeline=type(pipe).__name__,
        pipeline_options=pipeline_options(dict(pipe.config)),
    )


def _from_files(description: ExpertDescription, dtype: torch.dtype, cache: ComponentCache) -> Expert:
    """Load what was described, with its LoRAs fused into its weights."""
    loras = description.located.spec.loras if description.located is not None else ()

    def load(component: Component) -> nn.Module:
        shareable = component.name in TEXT_ENCODERS and not loras
        return cache.load(component, dtype) if shareable else component.load(dtype)

    expert = description.build(load)
    if loras:
        fold_in(expert, loras)
    return expert


def borrow_components(
    experts: Sequence[Expert], frame: str | None, dtype: torch.dtype | None
) -> Expert | None:
    """Give denoisers alone the text encoders, tokenizers and scheduler of a donor.

    frame: a pipeline's folder, which is the donor; None: the first expert that has text encoders
    Returns the donor; None if no expert needs one, or there is none, and denoisers alone stay what they are.
    Raises UserError for a frame that is no pipeline's folder, or that no expert needs.
    """
    bare = [expert for expert in experts if not expert.text_encoders]
    if frame is not None and not bare:
        raise UserError(
            f"frame '{frame}' gives components to experts that are denoisers alone, and all of these bring "
            "their own; leave it out, or choose another VAE with vae (--vae)"
        )
    if frame is not None:
        donor: Expert | None = load_donor(frame, dtype)
    else:
        donor = next((expert for expert in experts if expert.text_encoders), None)
    if donor is None or not bare:
        return None
    for expert in bare:
        expert.donor = donor
        expert.text_encoders, expert.tokenizers = list(donor.text_encoders), list(donor.tokenizers)
        expert.scheduler = expert.scheduler or donor_scheduler(expert, donor.scheduler)
        _check_options(expert, donor)
        expert.pipeline_options = dict(donor.pipeline_options)
    return donor


def _check_options(expert: Expert, donor: Expert) -> None:
    """Raise UserError if a transformer's file is said to be another model than the pipeline that it joins."""
    if not expert.pipeline_options:
        return
    settings = replace(expert, pipeline_options=donor.pipeline_options).settings
    for name in FAMILIES[expert.family].interface.pipeline_settings:
        its, expected = expert.settings.get(name), settings.get(name)
        if its != expected:
            raise UserError(
                f"expert '{expert.name}' is read as a model with {name} {its}, and '{donor.name}', which "
                f"lends it text encoders and scheduler, has {expected}; give the pipeline of its own kind "
                "with --frame, or the config of that pipeline with --config"
            )


def donor_scheduler(expert: Expert, scheduler: Any) -> Any:
    """A donor's scheduler, changed to the kind of prediction that the expert's own file names."""
    if scheduler is None:
        return None
    return predicting(scheduler, expert.prediction, f"expert '{expert.name}'")


def frame_scheduler(frame: str) -> Any:
    """The scheduler of a pipeline's folder. Raises UserError if it is no pipeline's."""
    return load_part(_pipeline(frame)[0], "scheduler")


def _pipeline(frame: str) -> tuple[Path, dict[str, Any]]:
    folder = Path(frame)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"frame '{frame}' is no pipeline's folder: it has no model_index.json")
    return folder, read_index(folder)


def load_donor(frame: str, dtype: torch.dtype | None) -> Expert:
    """A pipeline's folder without its denoiser. Raises UserError if it is none, or has no text encoders."""
    folder, index = _pipeline(frame)
    components = pipeline_components(folder, index, (*TEXT_ENCODERS, "vae"))
    vae = components.pop("vae", None)
    if not components:
        raise UserError(
            f"frame '{frame}' has no text encoders; give the folder of a whole text-to-image pipeline"
        )
    encoders = [component.load(dtype or torch.float32) for component in components.values()]
    for name, encoder in zip(components, encoders, strict=True):
        check_finite(encoder, f"the {name} of frame '{frame}'")
    return Expert(
        name=frame,
        model=None,
        text_encoders=encoders,
        tokenizers=load_tokenizers_of(folder, index),
        scheduler=load_part(folder, "scheduler"),
        vae_component=vae,
        pipeline=index["_class_name"],
        pipeline_options=pipeline_options(index),
        located=Located(ExpertSpec(frame, frame), folder),
    )
