"""The U-Net family (Stable Diffusion 1.x, 2.x, SDXL): stages, call, drop-in denoiser.

`UNet2DConditionModel` is read as stages IN00 … M00 … OUT11. IN stages save a skip connection, OUT stages take
one, and the last stage includes the output head. The names are those of block-weighted merging (MBW) and of
the paper's reference. Only the model's own sub-modules run; nothing of diffusers is copied or subclassed.

Source of the architecture: Ronneberger et al. 2015 (arXiv:1505.04597), as in Rombach et al. 2021
(arXiv:2112.10752).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser, split_joined
from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.stages.call import Call
from afa.stages.stage import Stage, StageContext, plain

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
    level, index = 0, 1
    first = {"owner": unet, "part": "conv_in"}
    yield Convolution(
        name="IN00", channels=plain(unet.conv_in).out_channels, level=level, saves_skip=True, **first
    )
    for number, block in enumerate(unet.down_blocks):
        place = f"down_blocks.{number}"
        for resnet, attention in zip(block.resnets, attentions(block), strict=True):
            layer = {"resnet": resnet, "attention": attention}
            yield Layer(
                name=f"IN{index:02}",
                channels=resnet.out_channels,
                level=level,
                block=place,
                saves_skip=True,
                **layer,
            )
            index += 1
        for count, conv in enumerate(block.downsamplers or ()):
            level += 1
            part = {"owner": block, "part": f"downsamplers.{count}"}
            yield Convolution(
                name=f"IN{index:02}",
                channels=conv.out_channels,
                level=level,
                block=place,
                saves_skip=True,
                **part,
            )
            index += 1


def _middle_stages(unet: Any, level: int) -> Iterator[Stage]:
    if unet.mid_block is not None:
        channels = unet.mid_block.resnets[-1].out_channels
        yield Middle(name="M00", channels=channels, level=level, block="mid_block", middle=unet.mid_block)


def _up_stages(unet: Any, level: int) -> Iterator[Stage]:
    index, last_block = 0, len(unet.up_blocks) - 1
    for number, block in enumerate(unet.up_blocks):
        for layer, (resnet, attention) in enumerate(zip(block.resnets, attentions(block), strict=True)):
            ends = layer == len(block.resnets) - 1
            upsampler = block.upsamplers[0] if ends and block.upsamplers else None
            whole = unet if ends and number == last_block else None
            level -= upsampler is not None
            yield Layer(
                name=f"OUT{index:02}",
                channels=resnet.out_channels if whole is None else plain(unet.conv_out).out_channels,
                level=level,
                block=f"up_blocks.{number}",
                takes_skip=True,
                upsamples=upsampler is not None,
                resnet=resnet,
                attention=attention,
                upsampler=upsampler,
                whole=whole,
            )
            index += 1


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


def check_state(unet: Any) -> None:
    """Raise NotImplementedError for FreeU or IP-Adapter, which may be enabled after the stages were read."""
    if any(getattr(block, "s1", None) is not None for block in unet.up_blocks):
        raise NotImplementedError(
            "FreeU is enabled on an expert, and an ensemble does not support it; "
            "call disable_freeu() on that expert"
        )
    if unet.encoder_hid_proj is not None and unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise NotImplementedError(
            "IP-Adapter weights are loaded into an expert, and an ensemble does not support them; "
            "call unload_ip_adapter()"
        )


def embed(
    unet: Any,
    sample: Tensor,
    timestep: Tensor | float | int,
    *,
    text: Tensor,
    added: dict[str, Tensor],
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, UNetContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:    (B, C, H, W) noisy latents
    timestep:  one number or (B,)
    text:      (B, T, D) text states
    added, class_labels, timestep_cond: as in the stock forward
    mask:      (B, H·W), 1 for positions to keep in self-attention
    text_mask: (B, T), 1 for text tokens to keep
    Returns the input of the first stage, and the context.
    """
    check_state(unet)
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
    classes = unet.get_class_embed(sample=sample, class_labels=class_labels)
    if classes is not None:
        temb = torch.cat([temb, classes], dim=-1) if unet.config.class_embeddings_concat else temb + classes
    extra = unet.get_aug_embed(emb=temb, encoder_hidden_states=text, added_cond_kwargs=added)
    temb = temb if extra is None else temb + extra
    if unet.time_embed_act is not None:
        temb = unet.time_embed_act(temb)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
    return sample, UNetContext(
        temb=temb,
        text=text,
        attention_bias=_bias(mask, sample),
        text_bias=_bias(text_mask, sample),
        options=attention_kwargs,
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


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Convert a mask to an additive bias that broadcasts over queries: (B, T) -> (B, 1, T)."""
    return None if mask is None else ((1 - mask.to(like.dtype)) * -10000.0).unsqueeze(1)


def widths(unet: Any) -> tuple[int, int]:
    """Return the widths of the time embedding (E) and of the text states (D)."""
    time = unet.time_embedding.linear_2.out_features
    if unet.class_embedding is not None and unet.config.class_embeddings_concat:
        time *= 2
    text = unet.config.cross_attention_dim
    if isinstance(text, (list, tuple)):
        if len(set(text)) > 1:
            raise ValueError(
                f"blocks with different cross_attention_dim {list(text)} cannot share one text input"
            )
        text = text[0]
    return time, text


XL = 5.0  # default guidance strength of SDXL's pipeline
TIMES = 6  # numbers of SDXL's micro-conditioning: original size, crop, target size, two each


class UNetCall(Call):
    """How U-Nets are called: unpacked latents, text states, and for SDXL pooled states and sizes."""

    latents_input = "sample"
    tokens = 77  # of CLIP
    encoded = (0, 2)
    joined = True
    changes_text = False
    frozen_text = False
    alike = (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "addition_embed_type",
        "addition_time_embed_dim",
        "time_cond_proj_dim",
    )
    guidance = 7.5

    def pipeline(self, text_encoders: int) -> str:
        return "StableDiffusionXLPipeline" if text_encoders == 2 else "StableDiffusionPipeline"

    def prompt_tokens(self, encoders: Sequence[Any]) -> int:
        return getattr(encoders[0], "max_position_embeddings", self.tokens) if encoders else self.tokens

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        if len(parts) == 1:
            return {"encoder_hidden_states": parts[0]}
        return {
            "encoder_hidden_states": parts[0],
            "added_cond_kwargs": {"text_embeds": parts[1], "time_ids": sizes},
        }

    def blank(self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
        text = config.encoder_hid_dim or config.cross_attention_dim
        parts = [empty(batch, tokens, text if isinstance(text, int) else text[0])]
        if config.addition_embed_type == "text_time":
            parts.append(
                empty(
                    batch,
                    config.projection_class_embeddings_input_dim - TIMES * config.addition_time_embed_dim,
                )
            )
        found = self.conditions(config, parts, empty(batch, TIMES))
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            found["class_labels"] = _labels(config, batch, empty)
        return found

    def strength(self, config: Any) -> float | None:
        return XL if config.addition_embed_type == "text_time" else self.guidance

    def guided(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        if negative is not None and self.unpaired(config):
            raise UserError(
                f"a negative prompt needs classifier-free guidance, and {self.unpaired(config)}; leave it out"
            )
        return super().guided(config, count, strength, negative, true)

    def unpaired(self, config: Any) -> str:
        return (
            ""
            if config.time_cond_proj_dim is None
            else "these experts have theirs built in (time_cond_proj_dim)"
        )


def _labels(config: Any, batch: int, empty: Callable[..., Tensor]) -> Tensor:
    """Make class labels without content, in the form of the U-Net's kind of class embedding."""
    if config.class_embed_type in ("projection", "simple_projection"):
        return empty(batch, config.projection_class_embeddings_input_dim)
    if config.class_embed_type == "identity":
        return empty(batch, 4 * config.block_out_channels[0])
    return torch.zeros(batch, dtype=torch.long, device=empty().device)


IMAGE_CONDITIONS = ("image_embeds", "hint")  # of added_cond_kwargs: IP-Adapter, Kandinsky


class UNetEnsemble(EnsembleDenoiser):
    """N `UNet2DConditionModel` experts as one. See EnsembleDenoiser for the arguments.

    text_widths: width of each text encoder's states, 768 and 1280 for SDXL, to split joined states; default:
                 one encoder with the width of the U-Net's cross-attention
    """

    family = "unet"
    call = UNetCall()
    read_stages = staticmethod(stages)
    output = UNet2DConditionOutput

    def __init__(self, experts: Sequence[Any], *args: Any, **options: Any) -> None:
        super().__init__(experts, *args, **options)
        self.text_widths = self.text_widths or (_text_input_width(experts[0]),)
        self._adapter_stages = adapter_stages(experts[0])
        self._down_factor = 2 ** experts[0].num_upsamplers

    @property
    def widths(self) -> tuple[int, int]:
        return widths(self.experts[0])

    @property
    def add_embedding(self) -> Any:
        """The first expert's embedding; the SDXL pipeline reads its width."""
        return self.experts[0].add_embedding

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states:            (B, T, D) for all experts, or (B, T, N·D): the states of each expert
        added_cond_kwargs["text_embeds"]: (B, P) or (B, N·P), in the same way
        Raises NotImplementedError for GLIGEN, IP-Adapter and other image conditions.
        """
        texts = self.split_text(encoder_hidden_states)
        added = self._split_added(added_cond_kwargs)
        return self._predict(
            partial(
                embed,
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                mask=attention_mask,
                text_mask=encoder_attention_mask,
            ),
            sample,
            timestep,
            [{"text": text, "added": own} for text, own in zip(texts, added, strict=True)],
            self._options(
                sample,
                down_block_additional_residuals,
                mid_block_additional_residual,
                down_intrablock_additional_residuals,
            ),
            cross_attention_kwargs,
            return_dict,
        )

    def split_text(self, states: Tensor) -> list[Tensor]:
        """Return each expert's text states. states: (B, T, D) for all experts, or (B, T, N·D)."""
        return split_joined(states, self.text_widths, len(self.experts), "encoder_hidden_states")

    def first_expert_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of a ControlNet: give it the first expert's part of the joined text."""
        kwargs = dict(kwargs)
        if kwargs.get("encoder_hidden_states") is not None:
            kwargs["encoder_hidden_states"] = self.split_text(kwargs["encoder_hidden_states"])[0]
        if kwargs.get("added_cond_kwargs"):
            kwargs["added_cond_kwargs"] = self._split_added(kwargs["added_cond_kwargs"])[0]
        return args, kwargs

    def _split_added(self, added: Mapping[str, Tensor] | None) -> list[dict[str, Tensor]]:
        """Return each expert's added conditions. Raises NotImplementedError for image conditions."""
        added = dict(added or {})
        for name in IMAGE_CONDITIONS:
            if name in added:
                raise NotImplementedError(
                    f"image conditions ({name}: IP-Adapter, Kandinsky) are not supported by an ensemble; "
                    "leave them out"
                )
        if "text_embeds" not in added or self.config.addition_embed_type != "text_time":
            return [added] * len(self.experts)
        times = self.config.addition_time_embed_dim * added["time_ids"].shape[-1]
        width = self.add_embedding.linear_1.in_features - times
        pooled = split_joined(added["text_embeds"], (width,), len(self.experts), "text_embeds")
        return [{**added, "text_embeds": own} for own in pooled]

    def _options(
        self,
        sample: Tensor,
        down: Sequence[Tensor] | None,
        middle: Tensor | None,
        adapter: Sequence[Tensor] | None,
    ) -> PassOptions:
        """Assign residuals of ControlNets (down and middle) and of T2I-Adapters to stages."""
        if adapter is None and middle is None and down is not None:
            down, adapter = None, down  # older T2I-Adapter pipelines pass theirs in the ControlNets' place
        adapter = adapter or ()
        if len(adapter) > len(self._adapter_stages):
            raise ValueError(
                f"{len(adapter)} T2I-Adapter residuals for {len(self._adapter_stages)} places; "
                "the adapter is of another architecture"
            )
        residuals = dict(zip(self._adapter_stages, adapter, strict=False))
        skip_residuals: dict[str, Tensor] = {}
        if down is not None and middle is not None:
            saving = [stage.name for stage in self.stages if stage.saves_skip]
            if len(down) != len(saving):
                raise ValueError(
                    f"{len(down)} ControlNet residuals for {len(saving)} skips; "
                    "the ControlNet is of another architecture"
                )
            skip_residuals = dict(zip(saving, down, strict=True))
            residuals["M00"] = residuals["M00"] + middle if "M00" in residuals else middle
        odd_size = any(side % self._down_factor for side in sample.shape[-2:])
        return PassOptions(residuals=residuals, skip_residuals=skip_residuals, odd_size=odd_size)


def _text_input_width(model: Any) -> int:
    """Return the width of the text states that a pipeline passes to this U-Net."""
    return model.config.encoder_hid_dim or widths(model)[1]
