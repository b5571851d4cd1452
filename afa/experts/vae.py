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
from afa.experts.layouts import vae_layout
from afa.experts.locate import Located
from afa.experts.parts import component_class
from afa.experts.single_file import config_folder, config_of

# The shipped config whose VAE an expert has, by its family; of U-Nets by the width of their text input.
VAE_CONFIGS = {name: name for name in ("sd3", "flux", "chroma", "z-image", "lumina2")}
UNET_VAES = {768: "sd15", 1024: "sd21", 2048: "sdxl"}


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
    from diffusers import AutoencoderKL

    found = read_file(path)
    layout = vae_layout(found)
    if layout is None:
        raise UserError(f"{path} holds no VAE; give a VAE's .safetensors file, its folder, or a whole model")
    settings, folder = _settings_for(path, config, like)
    kind = settings.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise UserError(
            f"{path}: the experts' VAE is an {kind}, and files are read of AutoencoderKL; "
            "give the VAE's folder"
        )
    decoder = f"{layout.prefix}decoder.conv_in.weight"
    channels = found[decoder].shape[1] if decoder in found else 0
    expected = settings.get("latent_channels")
    if channels != expected:
        whose = f"'{like.name}'" if like is not None and like.name else "the experts"
        raise UserError(
            f"the VAE in {path} has {channels} latent channels, {whose} expected {expected}; "
            "choose another VAE"
        )
    return Component("vae", AutoencoderKL, settings, folder, path, layout)


def _settings_for(file: Path, config: str | None, like: Expert | None) -> tuple[Mapping[str, Any], Path]:
    """The settings of the VAE that an expert was trained with, and the folder that they are from."""
    if config is not None:
        return _read(config_folder(config) / "vae", file), config_folder(config) / "vae"
    if like is None:
        raise UserError(f"{file} is a VAE alone, which does not say what it is for; give --config")
    if like.vae is not None:
        own: Any = like.vae.config
        return dict(own), file.parent
    component = like.vae_component
    if component is None and like.donor is not None and not (like.located and like.located.single_file):
        component = like.donor.vae_component
    if component is not None:
        return component.settings, component.config
    folder = _folder_for(file, like) / "vae"
    return _read(folder, file), folder


def _folder_for(file: Path, expert: Expert) -> Path:
    """The folder of configs of an expert that brings no VAE."""
    if expert.located is not None and expert.located.single_file:
        return config_of(expert.located, expert.config)[1]
    width = expert.model.config.get("cross_attention_dim")
    name = VAE_CONFIGS.get(expert.family) or UNET_VAES.get(width if isinstance(width, int) else 0)
    if name is None:
        raise UserError(
            f"{file}: which VAE an expert of family {expert.family} has is not known here; "
            "give the VAE's folder, or --config"
        )
    return config_folder(name)


def _read(folder: Path, file: Path) -> dict[str, Any]:
    """The settings in a VAE's folder, for a VAE in a file."""
    try:
        return read_object(folder / "config.json")
    except UserError as error:
        raise UserError(f"{file}: its settings {error}; give the VAE's folder, or --config") from None
