"""The FLUX.1 family: stages, call, drop-in denoiser.

`FluxTransformer2DModel` is read as stages D00 … D18 (double blocks), S00 … S37 (single blocks) and OUT.
Double blocks have separate weights for image and text tokens; single blocks process both as one sequence.
Every expert keeps its own text tokens. Only the model's own sub-modules run.

Source of the architecture: Black Forest Labs, FLUX.1 (github.com/black-forest-labs/flux).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.models.transformer import TIMES, BlockList, PackedInterface, TransformerEnsemble, block_residuals
from afa.stages.stage import Stage
from afa.stages.tokens import TokenContext, as_map, flat_ids, grid_of, image_ids

GUIDANCE = 3.5  # input of guidance-distilled models in training: the default of their pipelines


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    ids: Sequence[Tensor],
    grid: tuple[int, int],
    guidance: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, S, C) packed noisy latents
    timestep:              (B,) from 0 to 1
    encoder_hidden_states: (B, T, D) states of T5
    pooled_projections:    (B, P) pooled states of CLIP
    ids:                   position ids of text tokens (T, 3) and image tokens (S, 3)
    grid:                  rows and columns of image tokens
    guidance:              (B,) for guidance-distilled models
    Returns the image tokens as a map, and the context.
    """
    hidden = model.x_embedder(sample)
    time = timestep.to(hidden.dtype) * TIMES
    strength = () if guidance is None else (guidance.to(hidden.dtype) * TIMES,)
    temb = model.time_text_embed(time, *strength, pooled_projections)
    text = model.context_embedder(encoder_hidden_states)
    rotary = model.pos_embed(torch.cat([flat_ids(part) for part in ids], dim=0))
    conditions = {"temb": temb, "image_rotary_emb": rotary, "joint_attention_kwargs": attention_kwargs}
    return as_map(hidden, grid), TokenContext(
        temb=temb, text=text, text_tokens=text, grid=grid, conditions=conditions
    )


def residuals_of(
    stages: Sequence[Stage],
    double: Sequence[Tensor] | None,
    single: Sequence[Tensor] | None,
    grid: tuple[int, int],
    *,
    repeat: bool = False,
) -> dict[str, Tensor]:
    """Assign ControlNet residuals to double and to single blocks, see `block_residuals`.

    repeat: use the residuals of double blocks in turn, again and again
    """
    blocks = {name: [stage for stage in stages if stage.group == name] for name in ("double", "single")}
    return block_residuals(blocks["double"], double, grid, repeat=repeat) | block_residuals(
        blocks["single"], single, grid
    )


class FluxInterface(PackedInterface):
    """How FLUX.1 is called: packed latents, states of T5, pooled states of CLIP, position ids."""

    pipeline_class = "FluxPipeline"
    max_sequence_length = 512  # of T5
    prompt_outputs = (0, 1)
    prompt_names = ("prompt_embeds", "pooled_prompt_embeds")
    concat_text = True
    shared_config_keys = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
        "axes_dims_rope",
        "attention_head_dim",
    )
    guidance_scale = GUIDANCE
    aggregator_tokenizers = (1,)

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        call = super().denoiser_kwargs(config, noisy, times, conditions)
        call["img_ids"] = image_ids((noisy.shape[-2], noisy.shape[-1]), noisy)
        call["txt_ids"] = noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3)
        if config.guidance_embeds:
            call["guidance"] = torch.full((len(noisy),), GUIDANCE, device=noisy.device)
        return call

    def grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        return grid_of(call["img_ids"])

    def default_guidance(self, config: Any) -> float | None:
        return self.guidance_scale if config.guidance_embeds else None

    def pipeline_guidance(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """Return the pipeline's arguments for guidance; see ModelInterface.pipeline_guidance.

        strength: an input of guidance-distilled models
        true:     strength of classifier-free guidance, with a second pass for the negative or empty prompt
        """
        if strength is not None and not config.guidance_embeds:
            raise UserError(
                f"guidance {strength:g} changes nothing in models that were distilled without one "
                "(FLUX.1-schnell); leave it out, "
                "or give classifier-free guidance a strength of its own (--true-guidance)"
            )
        if true is None and negative is not None:
            raise UserError(
                "a negative prompt needs classifier-free guidance, "
                f"and {self.why_no_batched_guidance(config)}; "
                "give that a strength above 1 (--true-guidance), or leave the prompt out"
            )
        if true is not None and true <= 1:
            raise UserError(f"true guidance {true:g} adds nothing; give one above 1, or leave it out")
        built_in = self.default_guidance(config) if strength is None else strength
        guided: dict[str, Any] = {} if built_in is None else {"guidance_scale": built_in}
        if true is None:
            return guided
        return {**guided, "true_cfg_scale": true, "negative_prompt": [negative or ""] * count}

    def default_cfg_scale(self, config: Any) -> float:
        return 1.0

    def why_no_batched_guidance(self, config: Any) -> str:
        return (
            "these experts have theirs built in (guidance_embeds)"
            if config.guidance_embeds
            else "these experts were distilled to do without"
        )


class FluxEnsemble(TransformerEnsemble):
    """N `FluxTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "flux"
    interface = FluxInterface()
    block_lists = (
        BlockList("transformer_blocks", "D", "double"),
        BlockList("single_transformer_blocks", "S", "single"),
    )
    patch_size = 1  # the pipelines pack the latents
    default_placement = "every-4"
    encoder_hid_proj = None  # FLUX pipelines ask whether there is an IP-Adapter

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
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D): the states of each expert in order
        pooled_projections:    (B, P) or (B, N·P), in the same way
        Raises NotImplementedError for IP-Adapter, and for tokens of reference images.
        """
        grid = grid_of(img_ids)
        residuals = residuals_of(
            self.stages,
            controlnet_block_samples,
            controlnet_single_block_samples,
            grid,
            repeat=controlnet_blocks_repeat,
        )
        return self._predict(
            partial(embed, ids=(txt_ids, img_ids), grid=grid, guidance=guidance),
            hidden_states,
            timestep,
            self.split_by_expert(
                encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections
            ),
            encoder_hidden_states,
            PassOptions(residuals=residuals),
            joint_attention_kwargs,
            return_dict,
        )
