"""The drop-in U-Net: the stock `UNet2DConditionModel` forward, with N experts behind it."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.inputs import attention_options, split_joined
from afa.denoiser.lora import lora_scaled
from afa.denoiser.walk import Residuals
from afa.families import unet

IMAGE_CONDITIONS = ("image_embeds", "hint")  # of added_cond_kwargs: IP-Adapter, Kandinsky


class UNetEnsemble(EnsembleDenoiser):
    """N `UNet2DConditionModel` experts as one. See EnsembleDenoiser for the arguments.

    text_widths: 768 and 1280 for SDXL; needed to take apart the joined states of several encoders. Default: one encoder, as
    wide as the U-Net's cross-attention.
    """

    family = "unet"
    output = UNet2DConditionOutput

    def __init__(self, experts: Sequence[Any], *args: Any, **options: Any) -> None:
        super().__init__(experts, *args, **options)
        self.text_widths = self.text_widths or (_text_input_width(experts[0]),)
        self._adapter_stages = unet.adapter_stages(experts[0])
        self._down_factor = 2 ** experts[0].num_upsamplers

    @property
    def widths(self) -> tuple[int, int]:
        return unet.widths(self.experts[0])

    @property
    def add_embedding(self) -> Any:
        """The first expert's; the SDXL pipeline reads its width."""
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
        """The stock forward. encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D), each its own part.

        The same holds for added_cond_kwargs["text_embeds"]. Raises NotImplementedError for GLIGEN, IP-Adapter and
        other image conditions.
        """
        options, lora_scale = attention_options(cross_attention_kwargs)
        texts = self.split_text(encoder_hidden_states)
        added = self._split_added(added_cond_kwargs)
        residuals = self._residuals(down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals)

        def begin(expert: int) -> tuple[Tensor, unet.UNetTrace]:
            return unet.begin(
                self.experts[expert],
                *self.given(expert, sample, timestep),
                texts[expert],
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                added=added[expert],
                mask=attention_mask,
                text_mask=encoder_attention_mask,
                options=options,
            )

        odd_size = any(side % self._down_factor for side in sample.shape[-2:])
        with lora_scaled(self.experts, lora_scale):
            prediction = self._run(begin, timestep, residuals, odd_size, noisy=lambda: sample)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def split_text(self, states: Tensor) -> list[Tensor]:
        """Each expert's text states: (B, T, D) is everyone's, (B, T, N·D) is taken apart encoder by encoder."""
        return split_joined(states, self.text_widths, len(self.experts), "encoder_hidden_states")

    def narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook for a ControlNet: hand it the first expert's part of the joined text."""
        kwargs = dict(kwargs)
        if kwargs.get("encoder_hidden_states") is not None:
            kwargs["encoder_hidden_states"] = self.split_text(kwargs["encoder_hidden_states"])[0]
        if kwargs.get("added_cond_kwargs"):
            kwargs["added_cond_kwargs"] = self._split_added(kwargs["added_cond_kwargs"])[0]
        return args, kwargs

    def _split_added(self, added: Mapping[str, Tensor] | None) -> list[dict[str, Tensor]]:
        """Each expert's added conditions."""
        added = dict(added or {})
        for name in IMAGE_CONDITIONS:
            if name in added:
                raise NotImplementedError(f"image conditions ({name}: IP-Adapter, Kandinsky) are not supported by an ensemble; leave them out")
        if "text_embeds" not in added or self.config.addition_embed_type != "text_time":
            return [added] * len(self.experts)
        times = self.config.addition_time_embed_dim * added["time_ids"].shape[-1]
        width = self.add_embedding.linear_1.in_features - times
        pooled = split_joined(added["text_embeds"], (width,), len(self.experts), "text_embeds")
        return [{**added, "text_embeds": own} for own in pooled]

    def _residuals(self, down: Sequence[Tensor] | None, middle: Tensor | None, adapter: Sequence[Tensor] | None) -> Residuals:
        """ControlNet (down and middle) and T2I-Adapter residuals, by stage."""
        if adapter is None and middle is None and down is not None:
            down, adapter = None, down  # older T2I-Adapter pipelines pass theirs in the ControlNets' place
        residuals = Residuals()
        for name, residual in zip(self._adapter_stages, adapter or (), strict=False):
            residuals.to_hidden[name] = residual
        if adapter is not None and len(adapter) > len(self._adapter_stages):
            raise ValueError(f"{len(adapter)} T2I-Adapter residuals for {len(self._adapter_stages)} places; the adapter is of another architecture")
        if down is not None and middle is not None:
            saving = [stage.name for stage in self.stages if stage.saves_skip]
            if len(down) != len(saving):
                raise ValueError(f"{len(down)} ControlNet residuals for {len(saving)} skips; the ControlNet is of another architecture")
            residuals.to_skip = dict(zip(saving, down, strict=True))
            residuals.to_hidden["M00"] = residuals.to_hidden["M00"] + middle if "M00" in residuals.to_hidden else middle
        return residuals


def _text_input_width(model: Any) -> int:
    """How wide the text states are that a pipeline hands to this U-Net."""
    return model.config.encoder_hid_dim or unet.widths(model)[1]
