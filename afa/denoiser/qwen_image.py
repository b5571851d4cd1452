"""The drop-in Qwen-Image transformer: the stock `QwenImageTransformer2DModel` forward, with N experts behind it."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.inputs import attention_options
from afa.denoiser.lora import lora_scaled
from afa.denoiser.walk import Residuals
from afa.families import qwen_image
from afa.families.tokens import TokenTrace, as_map, as_tokens


class QwenImageEnsemble(EnsembleDenoiser):
    """N `QwenImageTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "qwen-image"

    @property
    def widths(self) -> tuple[int, int]:
        return qwen_image.widths(self.experts[0])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence[Any] | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The stock forward. encoder_hidden_states: (B, T, D) for all experts, its mask (B, T) with 1 for tokens to keep.

        Raises NotImplementedError for embedded guidance, which stock models cannot take either, for additional_t_cond (layers),
        and for images of several shapes (editing).
        """
        if encoder_hidden_states is None or timestep is None or img_shapes is None:
            raise ValueError("encoder_hidden_states, timestep and img_shapes are needed; give all three")
        for name, given in (("guidance", guidance), ("additional_t_cond", additional_t_cond)):
            if given is not None:
                raise NotImplementedError(f"{name} is not supported by an ensemble of Qwen-Image experts; leave it out")
        options, lora_scale = attention_options(attention_kwargs)
        shape = qwen_image.shape_of(img_shapes)
        self._check_text(encoder_hidden_states, encoder_hidden_states_mask)

        def begin(expert: int) -> tuple[Tensor, TokenTrace]:
            own = self.given(expert, hidden_states, timestep)
            return qwen_image.begin(self.experts[expert], *own, encoder_hidden_states, shape, encoder_hidden_states_mask, options)

        residuals = self._residuals(controlnet_block_samples, shape[1:])
        with lora_scaled(self.experts, lora_scale):
            prediction = as_tokens(self._run(begin, timestep, residuals, noisy=lambda: as_map(hidden_states, shape[1:])))
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _check_text(self, states: Tensor, mask: Tensor | None) -> None:
        """Raises ValueError for states that no expert takes, or a mask of others."""
        width = self.config.joint_attention_dim
        if states.shape[-1] != width:
            raise ValueError(f"encoder_hidden_states is {states.shape[-1]} wide; expected {width}, the same for all experts")
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(f"encoder_hidden_states_mask is {tuple(mask.shape)}; expected {tuple(states.shape[:2])}, as the states are")

    def _residuals(self, controls: Sequence[Tensor] | None, grid: tuple[int, int]) -> Residuals:
        """ControlNet residuals (B, S, C), each for several blocks in a row."""
        residuals = Residuals()
        if controls:
            blocks = self.stages[:-1]
            interval = ceil(len(blocks) / len(controls))
            for index, stage in enumerate(blocks):
                residuals.to_hidden[stage.name] = as_map(controls[index // interval], grid)
        return residuals
