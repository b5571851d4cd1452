"""The table of transformers in single files: by which tensors they are known, and which shipped config fits.

One entry for each way in which a family's tensors are named. Where those of the publisher lie is said by
afa/experts/transformer_places.py; others need no conversion.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from afa.errors import UserError

# What may stand before a transformer's names: in ComfyUI's checkpoints, nothing, in saved pipelines.
PREFIXES = ("model.diffusion_model.", "", "transformer.")
Shape = tuple[int | None, ...]  # None: any size


@dataclass(frozen=True)
class TransformerNames:
    """How single files name the tensors of one family's transformers.

    family:    for messages
    marks:     tensors that each such file has, and no other family's has all of
    configs:   shipped config -> tensors with their shapes that tell it from those after it; the first fits
               of which a file has all
    image:     the layer that takes the image's latents
    channels:  how many it takes
    others:    channels of other models of the same names, which take images beside the one that is drawn
    diffusers: whether the names are diffusers'; otherwise they are the publisher's
    """

    family: str
    marks: tuple[str, ...]
    configs: Mapping[str, Mapping[str, Shape]]
    image: str
    channels: int
    others: Mapping[int, str] = field(default_factory=dict)
    diffusers: bool = False

    def config(self, shapes: Mapping[str, tuple[int, ...]], file: Path) -> str:
        """The shipped config that fits a file.

        shapes: by tensor's name, without prefix
        Raises UserError for a transformer with other inputs than latents, or if no config fits.
        """
        channels = shapes[self.image][1] if len(shapes.get(self.image, ())) > 1 else 0
        if channels != self.channels:
            raise UserError(
                f"{file} takes {channels} input channels ({self.others.get(channels, 'unknown')}), "
                f"expected the {self.channels} of {self.family}; give a diffusers folder"
            )
        for config, wanted in self.configs.items():
            if all(name in shapes and _fits(shapes[name], shape) for name, shape in wanted.items()):
                return config
        raise UserError(
            f"{file} is a {self.family} of no size known here ({', '.join(self.configs)}); "
            "give its config folder with --config"
        )


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        most in (size, None) for size, most in zip(shape, wanted, strict=True)
    )


def _flux2(image: str) -> dict[str, dict[str, Shape]]:
    """The models of FLUX.2 by the width of their image layer."""
    widths = {"flux2": 6144, "flux2-klein-9b": 4096, "flux2-klein": 3072}
    return {config: {image: (width, None)} for config, width in widths.items()}


FILLED = {384: "FLUX.1 Fill", 128: "FLUX.1 Depth or Canny"}
TRANSFORMERS = (
    TransformerNames(
        "SD 3",
        ("joint_blocks.0.x_block.attn.qkv.weight",),
        {
            "sd35-large": {"joint_blocks.37.x_block.attn.qkv.weight": (None, None)},
            "sd35": {"joint_blocks.0.x_block.attn2.qkv.weight": (None, None)},
            "sd3": {},
        },
        "x_embedder.proj.weight",
        16,
    ),
    TransformerNames(
        "SD 3",
        ("pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"),
        {
            "sd35-large": {"transformer_blocks.37.attn.to_q.weight": (None, None)},
            "sd35": {"transformer_blocks.0.attn2.to_q.weight": (None, None)},
            "sd3": {},
        },
        "pos_embed.proj.weight",
        16,
        diffusers=True,
    ),
    TransformerNames(
        "FLUX.1",
        ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.weight", "img_in.weight"),
        {"flux": {"guidance_in.in_layer.weight": (None, None)}, "flux-schnell": {}},
        "img_in.weight",
        64,
        FILLED,
    ),
    TransformerNames(
        "FLUX.1",
        (
            "single_transformer_blocks.0.proj_mlp.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "x_embedder.weight",
        ),
        {
            "flux": {"time_text_embed.guidance_embedder.linear_1.weight": (None, None)},
            "flux-schnell": {},
        },
        "x_embedder.weight",
        64,
        FILLED,
        diffusers=True,
    ),
    TransformerNames(
        "FLUX.2",
        ("double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight", "img_in.weight"),
        _flux2("img_in.weight"),
        "img_in.weight",
        128,
    ),
    TransformerNames(
        "FLUX.2",
        (
            "double_stream_modulation_img.linear.weight",
            "single_stream_modulation.linear.weight",
            "x_embedder.weight",
        ),
        _flux2("x_embedder.weight"),
        "x_embedder.weight",
        128,
        diffusers=True,
    ),
    TransformerNames(
        "Chroma",
        ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
        {"chroma": {}},
        "img_in.weight",
        64,
    ),
    TransformerNames(
        "Chroma",
        (
            "distilled_guidance_layer.in_proj.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
            "x_embedder.weight",
        ),
        {"chroma": {}},
        "x_embedder.weight",
        64,
        diffusers=True,
    ),
    TransformerNames(
        "Z-Image",
        ("layers.0.adaLN_modulation.0.weight", "cap_embedder.1.weight", "x_embedder.weight"),
        {"z-image": {}},
        "x_embedder.weight",
        64,
    ),
    TransformerNames(
        "Z-Image",
        ("layers.0.adaLN_modulation.0.weight", "cap_embedder.1.weight", "all_x_embedder.2-1.weight"),
        {"z-image": {}},
        "all_x_embedder.2-1.weight",
        64,
        diffusers=True,
    ),
    TransformerNames(
        "Lumina 2",
        ("layers.0.adaLN_modulation.1.weight", "cap_embedder.1.weight", "x_embedder.weight"),
        {"lumina2": {}},
        "x_embedder.weight",
        64,
    ),
    TransformerNames(
        "Lumina 2",
        (
            "layers.0.norm1.linear.weight",
            "time_caption_embed.caption_embedder.1.weight",
            "x_embedder.weight",
        ),
        {"lumina2": {}},
        "x_embedder.weight",
        64,
        diffusers=True,
    ),
    TransformerNames(
        "Krea 2",
        ("txtfusion.projector.weight", "first.weight"),
        {"krea2": {}},
        "first.weight",
        64,
    ),
    TransformerNames(
        "Krea 2",
        ("text_fusion.projector.weight", "img_in.weight"),
        {"krea2": {}},
        "img_in.weight",
        64,
        diffusers=True,
    ),
    # ComfyUI's differ from the publisher's, which are diffusers', in one layer.
    TransformerNames(
        "Qwen-Image 2.1",
        ("txt_in.text_norm.weight", "transformer_blocks.0.img_mlp.gate_up.weight"),
        {"qwen-image-2.1": {}},
        "img_in.weight",
        64,
    ),
    TransformerNames(
        "Qwen-Image 2.1",
        ("txt_in.text_norm.weight", "transformer_blocks.0.img_mlp.gate_layer.weight"),
        {"qwen-image-2.1": {}},
        "img_in.weight",
        64,
        diffusers=True,
    ),
    TransformerNames(
        "Qwen-Image",
        ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        {"qwen-image": {}},
        "img_in.weight",
        64,
        diffusers=True,
    ),
)


def transformer_in(names: Collection[str]) -> tuple[TransformerNames, str] | None:
    """The entry of a file's transformer, and what stands before its names; None if it has none known here."""
    for entry in TRANSFORMERS:
        for prefix in PREFIXES:
            if all(f"{prefix}{mark}" in names for mark in entry.marks):
                return entry, prefix
    return None
