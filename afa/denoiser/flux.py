"""The drop-in FLUX.1 transformer: the stock `FluxTransformer2DModel` forward, with N experts behind it."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.inputs import attention_options, first_parts, split_joined
from afa.denoiser.lora import lora_scaled
from afa.denoiser.walk import Residuals
from afa.families import flux
from afa.families.tokens import TokenTrace, as_map, as_tokens


class FluxEnsemble(EnsembleDenoiser):
    """N `FluxTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "flux"
    encoder_hid_proj = None  # FLUX pipelines ask whether there is an IP-Adapter

    @property
    def widths(self) -> tuple[int, int]:
        return flux.widths(self.experts[0])

    def narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        widths = {"encoder_hidden_states": self.config.joint_attention_dim, "pooled_projections": self.config.pooled_projection_dim}
        return args, first_parts(kwargs, widths, len(self.experts))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The stock forward. encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D), each its own part.

        The same holds for pooled_projections. Raises NotImplementedError for IP-Adapter, and for tokens of reference images.
        """
        options, lora_scale = attention_options(joint_attention_kwargs)
        count, config = len(self.experts), self.config
        texts = split_joined(encoder_hidden_states, (config.joint_attention_dim,), count, "encoder_hidden_states")
        pooled = split_joined(pooled_projections, (config.pooled_projection_dim,), count, "pooled_projections")

        def begin(expert: int) -> tuple[Tensor, TokenTrace]:
            own, ids = self.given(expert, hidden_states, timestep), (txt_ids, img_ids)
            return flux.begin(self.experts[expert], *own, texts[expert], pooled[expert], ids, guidance, options)

        residuals = Residuals()
        if controlnet_block_samples or controlnet_single_block_samples:
            grid = flux.grid_of(img_ids)
            self._add("double", controlnet_block_samples, grid, residuals, controlnet_blocks_repeat)
            self._add("single", controlnet_single_block_samples, grid, residuals)
        with lora_scaled(self.experts, lora_scale):
            prediction = as_tokens(self._run(begin, timestep, residuals, noisy=lambda: as_map(hidden_states, flux.grid_of(img_ids))))
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _add(
        self, group: str, controls: Sequence[Tensor] | None, grid: tuple[int, int], residuals: Residuals, repeat: bool = False
    ) -> None:
        """ControlNet residuals (B, S, C) of a group of blocks: each for several blocks in a row, or all of them again and again."""
        if not controls:
            return
        blocks = [stage.name for stage in self.stages if stage.group == group]
        interval = ceil(len(blocks) / len(controls))
        for index, name in enumerate(blocks):
            residuals.to_hidden[name] = as_map(controls[index % len(controls) if repeat else index // interval], grid)
