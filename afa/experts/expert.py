"""An expert: one frozen source model, with the parts of its pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from afa.errors import UserError
from afa.experts.component import Component
from afa.experts.headers import check_finite
from afa.experts.locate import Located
from afa.experts.prediction import Prediction
from afa.models.registry import FAMILIES, family_of

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
# settings of pipelines besides their components that change what they compute, with the pipelines' defaults
SETTINGS = {"force_zeros_for_empty_prompt": True} | {
    name: usual for family in FAMILIES.values() for name, usual in family.interface.pipeline_settings.items()
}


@dataclass
class Expert:
    """One frozen source model.

    name:             unique in an ensemble
    model:            the denoiser; None: a component donor that is no expert itself
    text_encoders:    in the pipeline's order; empty: a denoiser alone
    tokenizers:       one for each text encoder
    scheduler:        None: unknown
    vae:              once it is loaded; see load_vae
    vae_component:    the files of its VAE; None: it has none, or was given as an object
    pipeline:         the name of the pipeline class that it belongs to
    pipeline_options: settings of the pipeline besides its components
    located:          its files; None: it was given as an object
    config:           the config that the user named for a single file
    hashes:           sha256 by file, once computed
    donor:            the pipeline whose text encoders, tokenizers, scheduler and VAE a denoiser alone uses
    prediction:       what a denoiser alone, or its user, says about its kind of prediction
    donor_files:      of a donor: the places of text encoders that are not its folder's, by name in a pipeline
    """

    name: str
    model: Any
    text_encoders: list[Any] = field(default_factory=list)
    tokenizers: list[Any] = field(default_factory=list)
    scheduler: Any = None
    vae: nn.Module | None = None
    vae_component: Component | None = None
    pipeline: str | None = None
    pipeline_options: dict[str, Any] = field(default_factory=dict)
    located: Located | None = None
    config: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    donor: "Expert | None" = None
    prediction: Prediction = field(default_factory=Prediction)
    donor_files: dict[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The name of the family that reads the denoiser. Raises ValueError if there is none."""
        return family_of(self.model)

    @property
    def settings(self) -> Any:
        """The denoiser's config, with the settings of its pipeline that say how it is used."""
        return FAMILIES[self.family].interface.with_settings(self.model.config, self.pipeline_options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser; of a component donor, of its first text encoder."""
        found: torch.dtype = next((self.model or self.text_encoders[0]).parameters()).dtype
        return found

    @property
    def has_vae(self) -> bool:
        """Whether it brings a VAE of its own."""
        return self.vae is not None or self.vae_component is not None

    def load_vae(self) -> nn.Module:
        """The expert's VAE, or its donor's; read on the first call. Raises UserError if there is none."""
        if self.vae is None and self.vae_component is not None:
            self.vae = load_finite_vae(self.vae_component, self.dtype)
        if self.vae is None and self.donor is not None:
            return self.donor.load_vae()
        if self.vae is None:
            raise UserError(f"expert '{self.name}' has no VAE; give one with vae=")
        return self.vae


def tokenizers_in(components: Mapping[str, Any]) -> list[Any]:
    """The tokenizers among a pipeline's components, or that of its processor of text and images."""
    found = [components[name] for name in TOKENIZERS if components.get(name) is not None]
    processor = components.get("processor")
    if found or processor is None:
        return found
    tokenizer = processor.tokenizer
    if processor.chat_template is not None:
        tokenizer.chat_template = processor.chat_template
    return [tokenizer]


def load_finite_vae(component: Component, dtype: torch.dtype) -> nn.Module:
    """Load a VAE. Raises UserError if its weights are missing, or hold NaN or infinity."""
    vae = component.load(dtype)
    check_finite(vae, f"the VAE of {component.weights}")
    return vae


def pipeline_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a pipeline besides its components that change what it computes.

    Raises UserError for steps that a pipeline prescribes (sample_sigmas of distilled models), and for a
    setting of another type than the pipeline's.
    """
    pipeline = config.get("_class_name") or "pipeline"
    if config.get("sample_sigmas"):
        raise UserError(
            f"a {pipeline} has sample_sigmas {config['sample_sigmas']!r:.60}: a distilled model with its own "
            "steps, which is not supported; expected null in its model_index.json"
        )
    found = {name: config[name] for name in SETTINGS if name in config}
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    for name, value in found.items():
        if value is not None and type(value) is not type(SETTINGS[name]):
            raise UserError(
                f"a {pipeline} has {name} {value!r:.60}, expected one such as "
                f"{SETTINGS[name]!r}; mend its model_index.json"
            )
    return found
