"""One component in a single file of its own: a U-Net or a VAE, under the original's names or diffusers'."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.folders import read_object
from afa.experts.headers import RENAMED, check_fit, read_file
from afa.experts.layouts import Layout, vae_layout
from afa.experts.original import config_folder, config_of

if TYPE_CHECKING:
    from afa.experts.load import Expert

# family -> config whose VAE it has; of U-Nets by the width of their text input
VAE_CONFIGS = {"sd3": "sd3", "flux": "flux"}
UNET_VAES = {768: "sd15", 1024: "sd21", 2048: "sdxl"}


def as_diffusers(model: Any, layout: Layout, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A component's tensors under diffusers' names.

    model: of the component's class and config, with or without numbers. where: for messages.
    Raises UserError for tensors that do not belong together.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    chosen = layout.select(tensors)
    if layout.diffusers:
        return {_today(name): tensor for name, tensor in chosen.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    try:
        return dict(convert(checkpoint=chosen, config=model.config))
    except (KeyError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{where} is incomplete or of another architecture ({reason}); download or export it again") from None


def read_component(file: Path, layout: Layout, maker: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A component with its weights. maker, config: its class and settings. Raises UserError if they do not fit each other."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model: nn.Module = maker.from_config(dict(config))
    where = f"the {layout.part} in {file}"
    tensors = as_diffusers(model, layout, load_file(file), where)
    check_fit(model, tensors, where)
    model.load_state_dict({name: tensors[name].to(dtype) for name in model.state_dict()}, assign=True)
    return model.eval()


def describe_vae(file: Path, like: "Expert | None", config: str | None) -> tuple[nn.Module, Layout]:
    """A VAE's own file by its header: -> its model without numbers, how its tensors are named.

    like: an expert that the VAE is to serve; config: what a user named; they decide the scale of its latents, which no file says.
    Raises UserError for a file that holds no VAE, or one of another kind than the expert's, with both numbers of channels.
    """
    from diffusers import AutoencoderKL

    found = read_file(file)
    layout = vae_layout(found)
    if layout is None:
        raise UserError(f"{file} holds no VAE; give a VAE's .safetensors file, its folder, or a whole model")
    settings = _settings(like, config, file)
    decoder = f"{layout.prefix}decoder.conv_in.weight"
    channels, expected = (found[decoder].shape[1] if decoder in found else 0), settings.get("latent_channels")
    if channels != expected:
        whom = f"'{like.name}'" if like is not None and like.name else "the experts"
        raise UserError(f"the VAE in {file} has {channels} latent channels, {whom} expected {expected}; choose another VAE")
    with torch.device("meta"):
        model: nn.Module = AutoencoderKL.from_config(settings)
    where = f"the VAE in {file}"
    check_fit(model, as_diffusers(model, layout, {name: entry.meta() for name, entry in found.items()}, where), where)
    return model, layout


def read_vae(file: Path, like: "Expert | None", config: str | None, dtype: torch.dtype) -> nn.Module:
    """A VAE from a file of its own. Arguments and errors: see describe_vae."""
    model: Any
    model, layout = describe_vae(file, like, config)
    return read_component(file, layout, type(model), model.config, dtype)


def _settings(like: "Expert | None", config: str | None, file: Path) -> dict[str, Any]:
    """The settings of the VAE that an expert was trained with."""
    if config is not None:
        return _read(config_folder(config) / "vae", file)
    if like is None:
        raise UserError(f"{file} is a VAE alone, which does not say what it is for; give --config")
    if like.vae is not None:
        own: Any = like.vae.config
        return dict(own)
    located = like.located
    if located is not None and located.single_file:
        return _read(config_of(located, like.config)[1] / "vae", file)
    for owner in (located, like.lender.located if like.lender is not None else None):
        if owner is not None and (owner.path / "vae" / "config.json").is_file():
            return _read(owner.path / "vae", file)
    width = like.model.config.get("cross_attention_dim")
    name = VAE_CONFIGS.get(like.family) or UNET_VAES.get(width if isinstance(width, int) else 0)
    if name is None:
        raise UserError(f"{file}: which VAE an expert of family {like.family} has is not known here; give the VAE's folder, or --config")
    return _read(config_folder(name) / "vae", file)


def _read(folder: Path, file: Path) -> dict[str, Any]:
    try:
        settings = read_object(folder / "config.json")
    except UserError as error:
        raise UserError(f"{file}: its settings {error}; give the VAE's folder, or --config") from None
    if settings.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError(f"{file}: the experts' VAE is an {settings['_class_name']}, and files are read of AutoencoderKL; give the VAE's folder")
    return settings


def _today(name: str) -> str:
    """A tensor's name as the installed diffusers has it."""
    for old, new in RENAMED[:4]:
        name = re.sub(old, new, name)
    return name
