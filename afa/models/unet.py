"""The U-Net family (Stable Diffusion 1.x, 2.x, SDXL): how it is called, and its drop-in denoiser.

How a U-Net is read as stages is in unet_stages.py.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser, split_joined
from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.models.unet_stages import UNetContext, adapter_stages, stages
from afa.stages.interface import ModelInterface


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


class UNetInterface(ModelInterface):
    """How U-Nets are called: unpacked latents, text states, and for SDXL pooled states and sizes."""

    latents_input = "sample"
    max_sequence_length = 77  # of CLIP
    prompt_outputs = (0, 2)
    concat_text = True
    changes_text = False
    frozen_text_encoders = False
    weighted_prompts = True
    shared_config_keys = (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "addition_embed_type",
        "addition_time_embed_dim",
        "time_cond_proj_dim",
    )
    guidance_scale = 7.5

    def pipeline_name(self, text_encoders: int, config: Any = None) -> str:
        return "StableDiffusionXLPipeline" if text_encoders == 2 else "StableDiffusionPipeline"

    def prompt_tokens(self, encoders: Sequence[Any]) -> int:
        return (
            getattr(encoders[0], "max_position_embeddings", self.max_sequence_length)
            if encoders
            else self.max_sequence_length
        )

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        if len(parts) == 1:
            return {"encoder_hidden_states": parts[0]}
        return {
            "encoder_hidden_states": parts[0],
            "added_cond_kwargs": {"text_embeds": parts[1], "time_ids": sizes},
        }

    def empty_conditions(
        self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]
    ) -> dict[str, Any]:
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

    def default_guidance(self, config: Any) -> float | None:
        return XL if config.addition_embed_type == "text_time" else self.guidance_scale

    def pipeline_guidance(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        reason = self.why_no_batched_guidance(config)
        if negative is not None and reason:
            raise UserError(f"a negative prompt needs classifier-free guidance, and {reason}; leave it out")
        return super().pipeline_guidance(config, count, strength, negative, true)

    def why_no_batched_guidance(self, config: Any) -> str:
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
    interface = UNetInterface()
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
            encoder_hidden_states,
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
