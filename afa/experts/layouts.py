"""Which model a .safetensors or .gguf file holds, by the names in its header, and those names in diffusers.

afa reads whole checkpoints of SD 1.x, 2.x and XL in the publisher's (LDM) layout; their U-Net alone, with the
prefix that it has in checkpoints, without it, or by diffusers' names; the transformers in the table of
afa/experts/transformer_names.py; and VAEs alone. Other models are refused with an error that names them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from afa.errors import UserError
from afa.experts.headers import beyond
from afa.experts.transformer_names import TRANSFORMERS, transformer_in
from afa.experts.transformer_places import from_original, transformer_places

DENOISER, VAE = "model.diffusion_model.", "first_stage_model."  # before a part's names in whole checkpoints
TEXT = ("cond_stage_model.", "conditioner.")
# component of a whole checkpoint -> the prefixes that its tensors may have (of SD 1.x and 2.x; of SDXL)
PREFIXES = {
    "unet": (DENOISER,),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
    "vae": (VAE,),
}
# prefixes of text encoders that are OpenCLIP's, within those above
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.")
# begins of names in files of a text encoder alone, the last three by llama.cpp
TEXT_ALONE = (
    "text_model.",
    "encoder.block.0.layer.",
    "transformer.resblocks.",
    "blk.",
    "enc.blk.",
    "token_embd.",
)
# Tensors that only a U-Net has (and below, only a VAE), and whether the name is diffusers'.
UNETS = (("input_blocks.0.0.weight", False), ("up_blocks.0.resnets.0.conv1.weight", True))
WAN = "decoder.middle.0.residual.0.gamma"  # of Wan's VAE, which Qwen-Image and Krea 2 have
VAES = (
    ("decoder.up.0.block.0.conv1.weight", False),
    ("decoder.up_blocks.0.resnets.0.conv1.weight", True),
    (WAN, False),
)
# prefix of a tensor's name -> a family that is not read as a single file; checked first, since some of them
# resemble FLUX.1, Chroma or Z-Image
FOREIGN = {
    "content_mode_blocks.": "FLUX.3",
    "nerf_image_embedder.": "Chroma1-Radiance",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "vector_in_vision.": "HunyuanImage",
    "time_text_embed.addition_t_embedding.": "Qwen-Image-Layered",
    "siglip_embedder.": "Z-Image-Omni",
    "clip_text_pooled_proj.": "NewBie",
    "double_stream_blocks.": "HiDream",
    "double_layers.0.": "AuraFlow",
    "llm_adapter.": "Anima",
    "head.modulation": "Wan",
    "mlp_t5.": "Hunyuan-DiT",
    "t_block.1.weight": "PixArt",
    "clip_txt_mapper.": "Stable Cascade",
    "t5_yproj.": "Mochi",
    "adaln_single.emb.": "PixArt or LTX-Video",
    "control_model.": "ControlNet",
    "controlnet_cond_embedding.": "ControlNet",
    "controlnet_blocks.0.": "ControlNet",
    "control_layers.0.": "ControlNet",
}
LORA = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", "lora_unet_", "lora_transformer_")


@dataclass(frozen=True)
class Layout:
    """How a single file names the tensors of one component, or of a whole checkpoint.

    part:      pipeline (a whole checkpoint), unet, transformer, vae, text_encoder or text_encoder_2
    prefix:    what stands before the component's names in this file
    diffusers: whether the names are diffusers'; otherwise they are the publisher's
    """

    part: str
    prefix: str = ""
    diffusers: bool = False

    @property
    def usual(self) -> str:
        """The prefix that converters of the publishers' names expect."""
        if self.diffusers or self.part.startswith("text_encoder"):
            return "" if self.diffusers else self.prefix
        return VAE if self.part == "vae" else DENOISER

    def own(self, name: str) -> str:
        """The name in this file of a tensor that converters expect under `name`."""
        return self.prefix + name.removeprefix(self.usual)

    def to_diffusers(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The component's tensors by diffusers' names, as diffusers' own converters make them.

        Those of transformers are read by the table that writes them: afa/experts/transformer_places.py.

        model:   of the component's class and settings, with or without weights
        tensors: by their names in the file, with or without content
        Raises KeyError, IndexError, AttributeError, ValueError or RuntimeError for tensors of another
        architecture.
        """
        from diffusers.loaders import single_file_utils as converters
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        if self.part == "transformer" and not self.diffusers:
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            places = transformer_places(shapes, model)
            keys = {self.prefix + place.key for place in places.values()}
            if (name := beyond(tensors, keys)) is not None:
                raise ValueError(f"{name} is of a layer that its config does not make")
            return {
                name: from_original(tensors[self.prefix + place.key], place) for name, place in places.items()
            }
        # the converter of Wan's VAE knows no prefix
        usual = "" if type(model).__name__ in CONVERTED_AS else self.usual
        chosen = {
            usual + name.removeprefix(self.prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(self.prefix)
        }
        if self.diffusers:
            return chosen
        if self.part.startswith("text_encoder"):
            prefix = next((one for one in OPEN_CLIP if any(name.startswith(one) for name in chosen)), None)
            if prefix is not None:
                return dict(converters.convert_open_clip_checkpoint(model, chosen, prefix=prefix))
            return dict(converters.convert_ldm_clip_checkpoint(chosen))
        kind = type(model).__name__
        if kind == "AutoencoderKLFlux2":
            return _flux2_vae(chosen, usual, model.config)
        convert = SINGLE_FILE_LOADABLE_CLASSES[CONVERTED_AS.get(kind, kind)]["checkpoint_mapping_fn"]
        return dict(convert(checkpoint=chosen, config=model.config))


# class -> the class whose converter reads its publisher's names
CONVERTED_AS = {"AutoencoderKLQwenImage": "AutoencoderKLWan"}


def _flux2_vae(tensors: Mapping[str, Tensor], usual: str, config: Any) -> dict[str, Tensor]:
    """FLUX.2's VAE by diffusers' names: the original autoencoder's, with the statistics of its latents.

    usual: what stands before the names
    Source: https://github.com/black-forest-labs/flux2 (src/flux2/autoencoder.py)
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    moved = {
        f"{usual}encoder.quant_conv.": "quant_conv.",
        f"{usual}decoder.post_quant_conv.": "post_quant_conv.",
    }
    found = {}
    for name, tensor in tensors.items():
        before = next((begin for begin in moved if name.startswith(begin)), None)
        found[name if before is None else f"{usual}{moved[before]}{name.removeprefix(before)}"] = tensor
    statistics = {
        name.removeprefix(usual): tensor for name, tensor in found.items() if name.startswith(f"{usual}bn.")
    }
    return dict(convert_ldm_vae_checkpoint(found, config)) | statistics


def layout_of(names: Collection[str], file: Any) -> Layout:
    """The layout of a file.

    names: of its tensors
    file:  for messages
    Raises UserError for a model that is not read, with its name.
    """
    for mark, diffusers in UNETS:
        for prefix in (DENOISER, ""):
            if f"{prefix}{mark}" in names and not _foreign(names):
                whole = any(name.startswith(TEXT) for name in names) and not diffusers and prefix == DENOISER
                return Layout("pipeline", DENOISER) if whole else Layout("unet", prefix, diffusers)
    family = _foreign(names)
    if family is None:
        found = transformer_in(names)
        if found is not None:
            return Layout("transformer", found[1], found[0].diffusers)
        vae = vae_layout(names)
        if vae is not None:
            return vae
    raise UserError(f"{file} {_strange(names, family)}")


def vae_layout(names: Collection[str]) -> Layout | None:
    """How a file names the tensors of a VAE, alone or in a whole checkpoint; None if it has no VAE."""
    for mark, diffusers in VAES:
        for prefix in (VAE, "", "vae."):
            if f"{prefix}{mark}" in names:
                return Layout("vae", prefix, diffusers)
    return None


def component_layouts(names: Collection[str]) -> dict[str, Layout]:
    """How a whole checkpoint names the tensors of each component. A VAE may be missing."""
    found = {}
    for part, prefixes in PREFIXES.items():
        prefix = next((one for one in prefixes if any(name.startswith(one) for name in names)), None)
        if prefix is not None or part != "vae":
            found[part] = Layout(part, prefix or prefixes[0])
    return found


def _foreign(names: Iterable[str]) -> str | None:
    """The name of a family that is not read as a single file; None if it is none of those."""
    begins = [name.removeprefix(DENOISER).removeprefix("net.").removeprefix("transformer.") for name in names]
    return next(
        (family for mark, family in FOREIGN.items() if any(name.startswith(mark) for name in begins)), None
    )


def _strange(names: Collection[str], family: str | None) -> str:
    """The error for a file that is not read: what it is, and what to do."""
    if any(mark in name for name in names for mark in LORA):
        return (
            "is no checkpoint in original layout but a LoRA; give it with the checkpoint it is for: "
            "base.safetensors+lora.safetensors"
        )
    if family == "ControlNet":
        return "is a ControlNet, which cannot be an expert; give it to the ensemble's pipeline(controlnet=…)"
    if family is not None:
        known = ", ".join(dict.fromkeys(entry.family for entry in TRANSFORMERS))
        return f"is a {family} model, which is not read as a single file; read are SD 1.x, 2.x, XL, {known}"
    if any(name.startswith("transformer_blocks.0.") for name in names):
        return (
            "is a transformer under diffusers' names, and of these single files are read of "
            f"{', '.join(dict.fromkeys(entry.family for entry in TRANSFORMERS if entry.diffusers))}; "
            "give its folder, with the config.json"
        )
    if any(name.startswith((*TEXT, *TEXT_ALONE)) for name in names):
        return (
            "is no checkpoint in original layout: it holds a text encoder and no denoiser; "
            "give the whole checkpoint or its U-Net"
        )
    return (
        f"is no checkpoint in original layout: it has neither {DENOISER}{UNETS[0][0]} nor a transformer of "
        f"{', '.join(dict.fromkeys(entry.family for entry in TRANSFORMERS))}; "
        "is it an embedding, an upscaler or another family?"
    )
