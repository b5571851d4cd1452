"""The drop-in SD3 transformer: the stock `SD3Transformer2DModel` forward, with N experts behind it."""

from collections.abc import Sequence
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.inputs import attention_options, first_parts, split_joined
from afa.denoiser.lora import lora_scaled
from afa.denoiser.walk import Residuals
from afa.families import sd3
from afa.families.tokens import TokenTrace, as_map


class SD3Ensemble(EnsembleDenoiser):
    """N `SD3Transformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "sd3"

    @property
    def widths(self) -> tuple[int, int]:
        return sd3.widths(self.experts[0])

    def narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        widths = {"encoder_hidden_states": self.config.joint_attention_dim, "pooled_projections": self.config.pooled_projection_dim}
        return args, first_parts(kwargs, widths, len(self.experts))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: Sequence[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The stock forward. encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D), each its own part.

        The same holds for pooled_projections. Raises NotImplementedError for IP-Adapter.
        """
        options, lora_scale = attention_options(joint_attention_kwargs)
        count, config = len(self.experts), self.config
        texts = split_joined(encoder_hidden_states, (config.joint_attention_dim,), count, "encoder_hidden_states")
        pooled = split_joined(pooled_projections, (config.pooled_projection_dim,), count, "pooled_projections")

        def begin(expert: int) -> tuple[Tensor, TokenTrace]:
            return sd3.begin(self.experts[expert], *self.given(expert, hidden_states, timestep), texts[expert], pooled[expert], options)

        grid = (hidden_states.shape[-2] // sd3.SD3Call.patch, hidden_states.shape[-1] // sd3.SD3Call.patch)
        residuals = self._residuals(block_controlnet_hidden_states, grid)
        skipped = [self.stages[index].name for index in skip_layers or ()]
        with lora_scaled(self.experts, lora_scale):
            prediction = sd3.unfold(self._run(begin, timestep, residuals, skipped=skipped, noisy=lambda: sd3.fold(hidden_states)))
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _residuals(self, controls: Sequence[Tensor] | None, grid: tuple[int, int]) -> Residuals:
        """ControlNet residuals (B, S, C), each for as many blocks as there are fewer of them; none where no text is left."""
        residuals = Residuals()
        if controls:
            blocks, without = self.stages[:-1], sd3.without_text(self.experts[0])
            for index, stage in enumerate(blocks):
                if stage.name not in without:
                    residuals.to_hidden[stage.name] = as_map(controls[int(index / (len(blocks) / len(controls)))], grid)
        return residuals
