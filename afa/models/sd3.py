"""The SD3 family (Stable Diffusion 3 and 3.5): stages, call, drop-in denoiser.

`SD3Transformer2DModel` is read as stages J00 … (24 joint blocks in SD3 and 3.5-medium, 38 in 3.5-large) and
OUT. Joint blocks change image and text tokens together; those of 3.5-medium attend to the
image twice. Every expert keeps its own text tokens. Only the model's own sub-modules run.

Source of the architecture: Esser et al., arXiv:2403.03206, section 4.
"""

from collections.abc import Sequence
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.models.transformer import BlockList, TransformerInterface, UnpackedEnsemble, block_residuals
from afa.stages.tokens import LEVEL, TokenContext, as_map


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, C, H, W) noisy latents
    timestep:              (B,)
    encoder_hidden_states: (B, T, D) states of all text encoders
    pooled_projections:    (B, P) pooled states of CLIP
    Returns the image tokens as a map, and the context.
    """
    grid = grid_of(sample)
    hidden = model.pos_embed(sample)
    temb = model.time_text_embed(timestep, pooled_projections)
    text = model.context_embedder(encoder_hidden_states)
    conditions = {"temb": temb, "joint_attention_kwargs": attention_kwargs}
    return as_map(hidden, grid), TokenContext(
        temb=temb, text=text, text_tokens=text, grid=grid, conditions=conditions
    )


def grid_of(sample: Tensor) -> tuple[int, int]:
    """Return the rows and columns of image tokens of latents (B, C, H, W)."""
    return sample.shape[-2] // 2**LEVEL, sample.shape[-1] // 2**LEVEL


class SD3Interface(TransformerInterface):
    """How SD3 is called: unpacked latents, the states of all text encoders, and pooled states."""

    pipeline_class = "StableDiffusion3Pipeline"
    max_sequence_length = 77 + 256  # of CLIP, then of T5
    prompt_outputs = (0, 2)
    guidance_scale = 7.0
    aggregator_tokenizers = (0, 2)  # both CLIP encoders read the same tokens
    concat_text = False  # the stock pipelines pad CLIP's states to T5's width, which would cut joined ones
    shared_config_keys = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
        "qk_norm",
        "dual_attention_layers",
    )


class SD3Ensemble(UnpackedEnsemble):
    """N `SD3Transformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "sd3"
    interface = SD3Interface()
    block_lists = (BlockList("transformer_blocks", "J"),)
    unused_in_last = ("attn.add_q_proj",)  # the attention output of its text tokens is dropped

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
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D): the states of each expert in order
        pooled_projections:    (B, P) or (B, N·P), in the same way
        Raises NotImplementedError for IP-Adapter.
        """
        *blocks, _ = self.stages
        controls = block_controlnet_hidden_states
        residuals = block_residuals(
            blocks[:-1],  # the last block, which drops the text tokens, gets none
            controls,
            grid_of(hidden_states),
            interval=len(blocks) / len(controls) if controls else None,
        )
        return self._predict(
            embed,
            hidden_states,
            timestep,
            self.split_by_expert(
                encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections
            ),
            encoder_hidden_states,
            PassOptions(
                residuals=residuals, skipped=[self.stages[index].name for index in skip_layers or ()]
            ),
            joint_attention_kwargs,
            return_dict,
        )
