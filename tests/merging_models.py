"""Pipelines to merge: tiny real ones of every family, saved once per session in every layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from original_layout import write_single_file
from safetensors.torch import load_file
from tiny import SMALL, scheduler, sd_unet, sdxl_unet, text_encoder
from tiny_transformers import flow_scheduler, flux_transformer, sd3_transformer, t5_encoder, t5_tokenizer
from transformers import CLIPTokenizer

import afa
from afa.cli.main import main
from afa.merging.settings import MergeSettings


def small_tokenizer() -> CLIPTokenizer:
    """The demonstration's tokenizer of 307 tokens; CLIP's own takes most of a test's time to read."""
    return CLIPTokenizer.from_pretrained(Path(afa.__file__).parent / "demo/assets/base/tokenizer", local_files_only=True)


def small_text(seed: int, width: int, **changes: Any) -> Any:
    """A text encoder for it."""
    tokens = {"vocab_size": 307, "bos_token_id": 305, "eos_token_id": 306, "pad_token_id": 306, "max_position_embeddings": 24}
    return text_encoder(seed, width=width, **{**tokens, **changes})


def small_vae(seed: int, **changes: Any) -> AutoencoderKL:
    """Two levels: half of the image's side."""
    torch.manual_seed(2000 + seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks, **changes).eval()


def sd(seed: int = 0, text_seed: int | None = None, **unet: Any) -> StableDiffusionPipeline:
    """A whole SD 1.x pipeline with a small U-Net and VAE."""
    return StableDiffusionPipeline(
        unet=sd_unet(seed, **{**SMALL, **unet}),
        text_encoder=small_text(seed if text_seed is None else text_seed, 24),
        tokenizer=small_tokenizer(),
        vae=small_vae(seed),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(seed: int = 0, **unet: Any) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline with its two text encoders."""
    return StableDiffusionXLPipeline(
        unet=sdxl_unet(seed, **unet),
        text_encoder=small_text(seed, 16),
        text_encoder_2=small_text(50 + seed, 24, projected=True),
        tokenizer=small_tokenizer(),
        tokenizer_2=small_tokenizer(),
        vae=small_vae(seed),
        scheduler=scheduler(),
    )


def sd3(seed: int = 0, text_seed: int = 0, **transformer: Any) -> StableDiffusion3Pipeline:
    """A whole SD3 pipeline with its three text encoders; they are frozen, as in the wild."""
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(seed, **transformer),
        text_encoder=small_text(text_seed, 16, projected=True),
        text_encoder_2=small_text(50 + text_seed, 24, projected=True),
        text_encoder_3=t5_encoder(text_seed, width=48),
        tokenizer=small_tokenizer(),
        tokenizer_2=small_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        vae=small_vae(seed, latent_channels=4, shift_factor=0.06),
        scheduler=flow_scheduler(),
    )


def flux(seed: int = 0, text_seed: int = 0, **transformer: Any) -> FluxPipeline:
    """A whole FLUX.1 pipeline."""
    return FluxPipeline(
        transformer=flux_transformer(seed, **transformer),
        text_encoder=small_text(text_seed, 16),
        text_encoder_2=t5_encoder(text_seed),
        tokenizer=small_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        vae=small_vae(seed, latent_channels=4, shift_factor=0.06),
        scheduler=flow_scheduler(),
    )


PIPELINES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def saved(pipe: Any, folder: Path, **options: Any) -> Path:
    """Save a pipeline as a diffusers folder."""
    pipe.save_pretrained(folder, **options)
    return folder


def weights_of(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights of a pipeline, by "part.name"."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def apart(one: Any, other: Any, part: str = "") -> float:
    """The largest difference between the weights of two pipelines (or of one part of them)."""
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    return max((mine[key].float() - theirs[key].float()).abs().max().item() for key in mine if key.startswith(part))


def apart_on_disk(folder: Path, other: Any) -> float:
    """The same between the files of a pipeline's folder and a pipeline, without the libraries' readers; T5's tied embedding is written once."""
    files = [file for file in folder.glob("*/*.safetensors") if ".index." not in file.name]
    mine = {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}
    theirs = {name: tensor for name, tensor in weights_of(other).items() if not name.endswith("encoder.embed_tokens.weight")}
    assert mine.keys() == theirs.keys()
    return max((mine[key].float() - theirs[key].float()).abs().max().item() for key in mine)


def write_experts(home: Path, **unet: Any) -> Path:
    """Three experts and their base as folders and as single files; "wide" does not fit."""
    for seed, name in enumerate(["a", "b", "c", "base"]):
        pipe = sd(seed, **unet)
        write_single_file(pipe, home / f"{name}.safetensors")
        saved(pipe, home / name)
    saved(sd(9, block_out_channels=(16, 64)), home / "wide")
    return home


def settings(home: Path, output: Path, *names: str, **changes: Any) -> MergeSettings:
    """A merge of some of them."""
    return MergeSettings([str(home / name) for name in names], str(output), **{"config": str(home / "a"), **changes})


def afa_merge(*arguments: object) -> int:
    """The command, and its exit code."""
    return main(["merge", *map(str, arguments)])
