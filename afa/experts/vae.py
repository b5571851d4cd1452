"""The VAE that a user chooses: a whole model's, a VAE's own folder, or its own single file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.errors import UserError
from afa.experts.component import Component
from afa.experts.description import components_of
from afa.experts.expert import Expert, load_finite_vae
from afa.experts.folders import read_config, read_object
from afa.experts.headers import read_file
from afa.experts.layouts import WAN, vae_layout
from afa.experts.locate import Located
from afa.experts.parts import component_class
from afa.experts.single_file import config_folder, config_of

# The shipped config of an expert without one, by its family; of U-Nets by the width of their text input.
CONFIGS_OF = {
    name: name for name in ("sd3", "flux", "chroma", "z-image", "lumina2", "qwen-image", "qwen-image-2.1")
}
# Classes of VAEs that are read from files in the publisher's names, and whether these are Wan's.
PUBLISHED = {"AutoencoderKL": False, "AutoencoderKLFlux2": False, "AutoencoderKLQwenImage": True}
UNET_CONFIGS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}


def load_vae(
    located: Located, config: str | None, dtype: torch.dtype, like: Expert | None = None
) -> nn.Module:
    """Load the VAE of a place. Arguments and errors: see describe_vae."""
    return load_finite_vae(describe_vae(located, config, like), dtype)


def describe_vae(located: Located, config: str | None = None, like: Expert | None = None) -> Component:
    """The VAE of a folder (a whole pipeline, or a VAE alone) or of a single file (the same).

    config: of a single file, as in load_expert
    like:   the expert that the VAE serves; a VAE alone in a file gets the settings of this expert's VAE,
            since no file holds the scale of its latents
    Raises UserError if there is no VAE, or one with other latent channels than the expert's.
    """
    path = located.path
    if located.whole_pipeline:
        folder = config_of(located, config)[1] if located.single_file else path
        component = components_of(located, folder).get("vae")
        if component is None:
            raise UserError(f"{path} has no VAE; choose another with vae=")
        return component
    if not located.single_file:
        class_name = str(read_config(path).get("_class_name"))
        if not hasattr(component_class(path, None, "diffusers", class_name), "encode"):
            raise UserError(f"{path} is no VAE (its config.json says {class_name})")
        return Component.read(path, "vae", "diffusers", class_name, path)
    found = read_file(path)
    layout = vae_layout(found)
    if layout is None:
        raise UserError(f"{path} holds no VAE; give a VAE's .safetensors file, its folder, or a whole model")
    settings, folder = _settings_for(path, config, like)
    kind = str(settings.get("_class_name", "AutoencoderKL"))
    wan = f"{layout.prefix}{WAN}" in found
    if not layout.diffusers and (PUBLISHED.get(kind) is None or PUBLISHED[kind] != wan):
        named = "Wan's" if wan else "the original autoencoder's"
        raise UserError(
            f"{path}: the experts' VAE is an {kind}, and the file has a VAE with {named} names; "
            "give the VAE of the experts, or its folder"
        )
    decoder = f"{layout.prefix}decoder.{'conv1' if wan else 'conv_in'}.weight"
    channels = found[decoder].shape[1] if decoder in found else 0
    expected = settings.get("latent_channels", settings.get("z_dim"))
    if channels != expected:
        whose = f"'{like.name}'" if like is not None and like.name else "the experts"
        raise UserError(
            f"the VAE in {path} has {channels} latent channels, {whose} expected {expected}; "
            "choose another VAE"
        )
    return Component("vae", component_class(folder, "vae", "diffusers", kind), settings, folder, path, layout)


def _settings_for(file: Path, config: str | None, like: Expert | None) -> tuple[Mapping[str, Any], Path]:
    """The settings of the VAE that an expert was trained with, and the folder that they are from."""
    if config is not None:
        return _read(config_folder(config) / "vae", file), config_folder(config) / "vae"
    if like is None:
        raise UserError(f"{file} is a VAE alone, which does not say what it is for; give --config")
    if like.vae is not None:
        own: Any = like.vae.config
        return dict(own), file.parent
    donor = None if like.located is not None and like.located.single_file else like.donor
    component = like.vae_component or (donor.vae_component if donor is not None else None)
    if component is not None:
        return component.settings, component.config
    if like.donor is not None and like.donor.model is None and like.donor.located is not None:  # a frame
        lent = like.donor.located.path / "vae"
        if (lent / "config.json").is_file():
            return _read(lent, file), lent
    configs = configs_of(like)
    if configs is None:
        raise UserError(
            f"{file}: which VAE an expert of family {like.family} has is not known here; "
            "give the VAE's folder, or --config"
        )
    return _read(configs / "vae", file), configs / "vae"


def configs_of(expert: Expert) -> Path | None:
    """The folder of configs of an expert that is a denoiser alone; None if several models have its family."""
    if expert.located is not None and expert.located.single_file:
        return config_of(expert.located, expert.config)[1]
    if expert.config is not None:
        return config_folder(expert.config)
    settings = expert.model.config
    width = settings.get("cross_attention_dim")
    name = CONFIGS_OF.get(expert.family) or UNET_CONFIGS.get(width if isinstance(width, int) else 0)
    if name == "flux" and not settings.get("guidance_embeds"):
        name = "flux-schnell"
    return None if name is None else config_folder(name)


def _read(folder: Path, file: Path) -> dict[str, Any]:
    """The settings in a VAE's folder, for a VAE in a file."""
    try:
        return read_object(folder / "config.json")
    except UserError as error:
        raise UserError(f"{file}: its settings {error}; give the VAE's folder, or --config") from None
