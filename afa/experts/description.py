"""An expert as its files describe it: one description, from which every command works.

It is made from configs and headers of weight files. `expert` is the expert on the meta device, which can be
compared, counted and measured; afa/experts/load.py makes the same expert with weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.errors import UserError
from afa.experts.component import Component
from afa.experts.expert import TEXT_ENCODERS, Expert, pipeline_options
from afa.experts.folders import read_config
from afa.experts.headers import read_file
from afa.experts.layouts import Layout, component_layouts
from afa.experts.locate import Located, locate
from afa.experts.parts import INDEX, component_of, has_part, load_part, load_tokenizers_of, read_index
from afa.experts.prediction import Prediction, flow_only, folder_scheduler
from afa.experts.single_file import VARIANTS, config_folder, config_of, load_tokenizers, scheduler_of
from afa.experts.spec import ExpertSpec
from afa.models.registry import FAMILIES


@dataclass
class ExpertDescription:
    """What an expert is made of, before its weights are read.

    name:         of the expert
    components:   by their names in a pipeline: the denoiser, text encoders, the VAE
    folder:       the folder of its configs
    located:      its files; None: a shipped config without files
    config:       what the config of a single file is called: sd15, sdxl, …, a folder, or "its header"
    given_config: the config that the user named for a single file
    index:        the content of model_index.json; None: a denoiser alone
    tokenizers:   one for each text encoder
    scheduler:    of the pipeline, or of a U-Net's single file; None: unknown
    prediction:   what a single file, or its user, says about the kind of prediction
    options:      settings of the pipeline that a transformer's file is of; {}: those of the one it joins
    lacking:      the sentence that says what a file with some of a pipeline's parts lacks; None: nothing
    """

    name: str
    components: dict[str, Component]
    folder: Path
    located: Located | None = None
    config: str | None = None
    given_config: str | None = None
    index: dict[str, Any] | None = None
    tokenizers: list[Any] = field(default_factory=list)
    scheduler: Any = None
    prediction: Prediction = field(default_factory=Prediction)
    options: dict[str, Any] = field(default_factory=dict)
    lacking: str | None = None

    @property
    def denoiser(self) -> Component:
        """The denoiser."""
        return next(iter(self.components.values()))

    @property
    def text_parts(self) -> list[str]:
        """The text encoders' names, in the pipeline's order."""
        return [name for name in TEXT_ENCODERS if name in self.components]

    @property
    def parts(self) -> dict[str, nn.Module]:
        """All components on the meta device, by name. Raises UserError for files that lack weights."""
        return {name: component.model for name, component in self.components.items()}

    @cached_property
    def expert(self) -> Expert:
        """The expert on the meta device. Raises UserError for files that lack weights."""
        expert = self.build(lambda component: component.model)
        expert.scheduler = self.scheduler
        expert.vae = self.parts.get("vae")
        return expert

    def build(self, make: Callable[[Component], nn.Module]) -> Expert:
        """The expert, with a VAE that is not read yet.

        make: gives the model of a component
        """
        return Expert(
            name=self.name,
            model=make(self.denoiser),
            text_encoders=[make(self.components[name]) for name in self.text_parts],
            tokenizers=list(self.tokenizers),
            # a denoiser alone is used with the scheduler of the pipeline that gives it text encoders
            scheduler=self.scheduler if self.text_parts else None,
            vae_component=self.components.get("vae"),
            pipeline=None if self.index is None else self.index["_class_name"],
            pipeline_options=pipeline_options(self.index or {}) | self.options,
            located=self.located,
            config=self.given_config,
            prediction=self.prediction,
        )

    @cached_property
    def loras_change_text(self) -> bool:
        """Whether LoRAs may change the text encoders. Raises UserError for a broken LoRA file."""
        loras = self.located.spec.loras if self.located is not None else ()
        files = [read_file(Path(lora.path)) for lora in loras]
        return any(
            not names or any("lora_te" in name or "text_encoder" in name for name in names) for names in files
        )


def describe(located: Located, config: str | None = None) -> ExpertDescription:
    """Describe an expert by its configs; its weight files are not opened yet.

    config: of a single file, the name of a shipped config or a folder of configs; None: detected
    Raises UserError for what cannot be an expert.
    """
    spec = located.spec
    if spec.loras and not located.whole_pipeline:
        raise UserError(
            f"expert '{spec.name}': a LoRA needs a whole pipeline to join, "
            f"and {located.path} is only a denoiser"
        )
    name, folder = config_of(located, config) if located.single_file else (None, located.path)
    found = ExpertDescription(spec.name, components_of(located, folder), folder, located, name, config)
    if located.whole_pipeline:
        found.index = read_index(folder)
    if located.single_file and located.layout.part == "transformer":
        found.prediction = flow_only(located)
        if config is not None or name in VARIANTS:
            found.options = pipeline_options(read_index(folder))
    elif located.single_file:
        found.scheduler, found.prediction = scheduler_of(located, config, folder)
        found.tokenizers = list(load_tokenizers(folder).values()) if found.index is not None else []
    elif found.index is not None:
        found.scheduler = folder_scheduler(located, found.index)
        found.tokenizers = load_tokenizers_of(folder, found.index)
    else:
        found.prediction = Prediction(spec.prediction_type)
    return found


def components_of(located: Located, folder: Path) -> dict[str, Component]:
    """The components of an expert by their names in a pipeline, the denoiser first.

    folder: of its configs
    Raises UserError for settings that are broken, or of a class that cannot be an expert.
    """
    path = located.path
    if not located.single_file and not located.whole_pipeline:
        class_name = str(read_config(path).get("_class_name"))
        component = Component.read(path, None, "diffusers", class_name, path)
        return {component.name: component}
    index = read_index(folder)
    denoiser = component_of(folder, index)
    if not located.single_file:
        return pipeline_components(folder, index, (denoiser, *TEXT_ENCODERS, "vae"))
    if not located.whole_pipeline:
        return pipeline_components(folder, index, (denoiser,), path, {denoiser: located.layout})
    layouts = component_layouts(read_file(path))
    names = (
        denoiser,
        *TEXT_ENCODERS,
        *(["vae"] if "vae" in layouts else []),
    )  # another expert's VAE may serve
    return pipeline_components(folder, index, names, path, layouts)


def pipeline_components(
    folder: Path,
    index: dict[str, Any],
    names: Sequence[str],
    file: Path | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Component]:
    """Those components of a pipeline that it has.

    folder:  of the pipeline, or of its configs
    index:   the content of its model_index.json
    names:   of the components; a VAE may be left out of a download
    file:    the single file with the weights; None: they lie in the folder
    layouts: how a single file names each component's tensors
    """
    present = [
        name for name in names if has_part(index, name) and (name != "vae" or (folder / name).is_dir())
    ]
    found = {}
    for name in present:
        library, class_name = index[name]
        layout = layouts[name] if layouts else None
        found[name] = Component.read(folder / name, name, library, class_name, file or folder / name, layout)
    return found


def describe_expert(spec: ExpertSpec, config: str | None = None) -> ExpertDescription:
    """Find an expert and check its files, by their headers alone.

    config: as in describe
    Raises UserError if it cannot be found, is broken, cut off or incomplete, or cannot be an expert.
    """
    found = describe(locate(spec), config)
    _ = found.loras_change_text
    model = found.expert.model
    try:
        FAMILIES[found.expert.family].stages(model)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"expert '{spec.name}': {error}") from None
    return found


def denoiser_config(located: Located, family: str, config: str | None = None) -> Any:
    """The config of an expert's denoiser, with the defaults of its class and the settings of its pipeline.

    Its weight files are not opened.
    family: the name of the family that the denoiser must be of
    config: of a single file, as in describe
    Raises UserError for settings that are broken, or of another family.
    """
    folder = config_of(located, config)[1] if located.single_file else located.path
    denoiser = next(iter(components_of(located, folder).values()))
    if denoiser.kind.__name__ != FAMILIES[family].model:
        found, expected = denoiser.kind.__name__, FAMILIES[family].model
        raise UserError(
            f"{located.path} has a {found}, expected a {expected}; give an expert of family {family}"
        )
    index = read_index(folder) if (folder / INDEX).is_file() else {}
    with torch.device("meta"):
        model: Any = denoiser.make()
    return FAMILIES[family].interface.with_settings(model.config, pipeline_options(index))


def describe_config(name: str, config: str) -> ExpertDescription:
    """An expert of an architecture, without any files of its own.

    name:   of the expert
    config: the name of a shipped config, or a folder of configs
    """
    folder = config_folder(config)
    index = read_index(folder)
    names = (component_of(folder, index), *TEXT_ENCODERS, "vae")
    components = {
        part: replace(component, weights=None)
        for part, component in pipeline_components(folder, index, names).items()
    }
    scheduler = load_part(folder, "scheduler") if has_part(index, "scheduler") else None
    return ExpertDescription(name, components, folder, config=config, index=index, scheduler=scheduler)


def shared_text_encoders(experts: Sequence[ExpertDescription]) -> list[list[str | None]]:
    """Find equal text encoders, which an ensemble keeps and runs once.

    Of configs without files, those are equal that the family's fine-tunes leave unchanged.
    Returns, by expert and text encoder, the first expert with an equal one; None: it is the first.
    """
    return [
        [_first_with_same(experts[:place], mine, part) for part in mine.text_parts]
        for place, mine in enumerate(experts)
    ]


def _first_with_same(earlier: Sequence[ExpertDescription], mine: ExpertDescription, part: str) -> str | None:
    for other in earlier:
        if mine.located is None:
            same = FAMILIES[mine.expert.family].interface.frozen_text_encoders and other.config == mine.config
        else:
            changed = mine.loras_change_text or other.loras_change_text
            same = (
                not changed
                and part in other.components
                and mine.components[part].same_as(other.components[part])
            )
        if same:
            return other.name
    return None
