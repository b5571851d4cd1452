"""A U-Net (Stable Diffusion 1.x, 2.x, SDXL) as stages.

`UNet2DConditionModel` is read as stages IN00 … M00 … OUT11. IN stages save a skip connection, OUT stages take
one, and the last stage includes the output head. The names are those of block-weighted merging (MBW) and of
the paper's reference. Only the model's own sub-modules run; nothing of diffusers is copied or subclassed.

Source of the architecture: Ronneberger et al. 2015 (arXiv:1505.04597), as in Rombach et al. 2021
(arXiv:2112.10752).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from afa.stages.stage import Stage, StageContext, base_layer

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
MIDDLE_BLOCKS = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclass(kw_only=True)
class UNetContext(StageContext):
    """The context of a U-Net.

    attention_bias: (B, 1, T) added to the scores of self-attention; None: nothing
    text_bias:      (B, 1, T) added to the scores of cross-attention, strongly negative for masked tokens
    options:        of the attention processors
    """

    attention_bias: Tensor | None = None
    text_bias: Tensor | None = None
    options: dict[str, Any] | None = None

    def attention(self) -> dict[str, Any]:
        """Return the keyword arguments of a diffusers attention block."""
        return {
            "encoder_hidden_states": self.text,
            "attention_mask": self.attention_bias,
            "encoder_attention_mask": self.text_bias,
            "cross_attention_kwargs": self.options,
        }


@dataclass(kw_only=True, eq=False)
class Convolution(Stage):
    """The first convolution, or a downsampler.

    owner: module that contains it
    part:  its name in the owner; it is looked up at each run, since a LoRA may wrap it later
    """

    owner: nn.Module
    part: str

    @property
    def conv(self) -> nn.Module:
        return self.owner.get_submodule(self.part)

    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        return self.conv(hidden), context

    def modules(self) -> list[object]:
        return [self.conv]


@dataclass(kw_only=True, eq=False)
class Layer(Stage):
    """A residual block and its attention; then a block's upsampler, or the U-Net's output head.

    whole: the U-Net, in its last stage; None elsewhere
    """

    resnet: nn.Module
    attention: nn.Module | None = None
    upsampler: nn.Module | None = None
    whole: nn.Module | None = None

    @property
    def head(self) -> tuple[nn.Module, ...]:
        """The output head, looked up at each run, since a LoRA may wrap a part of it later."""
        return () if self.whole is None else output_head(self.whole)

    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        assert isinstance(context, UNetContext)
        if skip is not None:
            hidden = torch.cat([hidden, skip], dim=1)
        hidden = self.resnet(hidden, context.temb)
        if self.attention is not None:
            hidden = self.attention(hidden, **context.attention(), return_dict=False)[0]
        if self.upsampler is not None:
            hidden = self.upsampler(hidden, size)
        for module in self.head:
            hidden = module(hidden)
        return hidden, context

    def modules(self) -> list[object]:
        return [
            module
            for module in (self.resnet, self.attention, self.upsampler, *self.head)
            if module is not None
        ]


@dataclass(kw_only=True, eq=False)
class Middle(Stage):
    """The middle block as a whole."""

    middle: nn.Module

    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        assert isinstance(context, UNetContext)
        if getattr(self.middle, "has_cross_attention", False):
            return self.middle(hidden, context.temb, **context.attention()), context
        return self.middle(hidden, context.temb), context

    def modules(self) -> list[object]:
        return [self.middle]


def stages(unet: Any) -> tuple[Stage, ...]:
    """Read a `UNet2DConditionModel` as stages: 25 for SD 1.x and 2.x, 19 for SDXL.

    Raises ValueError, naming the part, for a U-Net with parts that are not supported.
    """
    check_supported(unet)
    down = list(_down_stages(unet))
    return (*down, *_middle_stages(unet, level=down[-1].level), *_up_stages(unet, level=down[-1].level))


def _down_stages(unet: Any) -> Iterator[Stage]:
    names, level = (f"IN{index:02}" for index in count()), 0
    yield Convolution(
        name=next(names),
        channels=base_layer(unet.conv_in).out_channels,
        level=level,
        saves_skip=True,
        owner=unet,
        part="conv_in",
    )
    for number, block in enumerate(unet.down_blocks):
        shared: dict[str, Any] = {"block": f"down_blocks.{number}", "saves_skip": True}
        for resnet, attention in zip(block.resnets, attentions(block), strict=True):
            width = resnet.out_channels
            yield Layer(
                name=next(names), channels=width, level=level, resnet=resnet, attention=attention, **shared
            )
        for index, conv in enumerate(block.downsamplers or ()):
            level, width, part = level + 1, conv.out_channels, f"downsamplers.{index}"
            yield Convolution(name=next(names), channels=width, level=level, owner=block, part=part, **shared)


def _middle_stages(unet: Any, level: int) -> Iterator[Stage]:
    if unet.mid_block is not None:
        channels = unet.mid_block.resnets[-1].out_channels
        yield Middle(name="M00", channels=channels, level=level, block="mid_block", middle=unet.mid_block)


def _up_stages(unet: Any, level: int) -> Iterator[Stage]:
    names = (f"OUT{index:02}" for index in count())
    for number, block in enumerate(unet.up_blocks):
        for resnet, attention in zip(block.resnets, attentions(block), strict=True):
            ends = resnet is block.resnets[-1]
            upsampler = block.upsamplers[0] if ends and block.upsamplers else None
            whole = unet if ends and block is unet.up_blocks[-1] else None
            level -= upsampler is not None
            yield Layer(
                name=next(names),
                channels=resnet.out_channels if whole is None else base_layer(unet.conv_out).out_channels,
                level=level,
                block=f"up_blocks.{number}",
                takes_skip=True,
                upsamples=upsampler is not None,
                resnet=resnet,
                attention=attention,
                upsampler=upsampler,
                whole=whole,
            )


def attentions(block: Any) -> list[nn.Module | None]:
    """Return the attention after each residual block of a down or up block, or None for each."""
    return (
        list(block.attentions)
        if getattr(block, "has_cross_attention", False)
        else [None] * len(block.resnets)
    )


def output_head(unet: Any) -> tuple[Any, ...]:
    """Return the modules after the last up block."""
    norm = (unet.conv_norm_out, unet.conv_act) if unet.conv_norm_out is not None else ()
    return (*norm, unet.conv_out)


def check_supported(unet: Any) -> None:
    """Raise ValueError, naming the part, for a U-Net that stages would compute differently."""
    parts = [(block, UP_BLOCKS) for block in unet.up_blocks] + [
        (block, DOWN_BLOCKS) for block in unet.down_blocks
    ]
    parts += [(unet.mid_block, MIDDLE_BLOCKS)] if unet.mid_block is not None else []
    for block, known in parts:
        kind = type(block).__name__
        if kind not in known:
            raise ValueError(
                f"a U-Net with a {kind} cannot be read as stages; supported here are {', '.join(known)}"
            )
        if len(getattr(block, "upsamplers", None) or ()) > 1:
            raise ValueError(f"a {kind} with several upsamplers cannot be read as stages")
    config = unet.config
    if config.addition_embed_type not in (None, "text", "text_time"):
        raise ValueError(
            f"addition_embed_type '{config.addition_embed_type}' is not supported; "
            "only text and text_time are"
        )
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        raise ValueError(
            f"encoder_hid_dim_type '{config.encoder_hid_dim_type}' (image conditions) is not supported"
        )


def adapter_stages(unet: Any) -> list[str]:
    """Return the names of the stages after which T2I-Adapter residuals are added, in order.

    It is the last attention of each down block, or its last stage if it has no attention, then M00.
    """
    names, all_stages = [], stages(unet)
    for number, block in enumerate(unet.down_blocks):
        own = [stage for stage in all_stages if stage.block == f"down_blocks.{number}"]
        layers = [stage for stage in own if isinstance(stage, Layer)]
        names.append((layers if getattr(block, "has_cross_attention", False) else own)[-1].name)
    return names + [stage.name for stage in all_stages if isinstance(stage, Middle)]
