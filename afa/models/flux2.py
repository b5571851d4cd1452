"""The FLUX.2 family: stages, call, drop-in denoiser.

`Flux2Transformer2DModel` is read as stages D00 … D07 (double blocks), S00 … S47 (single blocks) and OUT; the
smaller klein models have fewer. Double blocks have separate weights for image and text tokens; single blocks
process both as one sequence. One modulation of the time embedding serves all blocks of a kind. Every expert
keeps its own text tokens. Only the model's own sub-modules run.

Source of the architecture: Black Forest Labs, FLUX.2 (github.com/black-forest-labs/flux2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.errors import UserError
from afa.models.transformer import TIMES, BlockList, PackedInterface, TransformerEnsemble
from afa.stages.tokens import Block, TokenContext, as_map, grid_of

GUIDANCE = 4.0  # default of the stock pipelines; the input of guidance-distilled models in training


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    ids: Sequence[Tensor],
    grid: tuple[int, int],
    guidance: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, S, C) packed noisy latents
    timestep:              (B,) from 0 to 1
    encoder_hidden_states: (B, T, D) states of several layers of the text encoder, side by side
    ids:                   position ids of text tokens (T, 4) and image tokens (S, 4)
    grid:                  rows and columns of image tokens
    guidance:              (B,) for guidance-distilled models
    Returns the image tokens as a map, and the context.
    """
    strength = None if guidance is None else guidance.to(sample.dtype) * TIMES
    temb = model.time_guidance_embed(timestep.to(sample.dtype) * TIMES, strength)
    hidden = model.x_embedder(sample)
    text = model.context_embedder(encoder_hidden_states)
    tables = [model.pos_embed(part[0] if part.ndim == 3 else part) for part in ids]
    conditions = {
        "temb_mod_img": model.double_stream_modulation_img(temb),
        "temb_mod_txt": model.double_stream_modulation_txt(temb),
        "temb_mod": model.single_stream_modulation(temb),
        "image_rotary_emb": tuple(torch.cat(parts, dim=0) for parts in zip(*tables, strict=True)),
        "joint_attention_kwargs": attention_kwargs,
    }
    return as_map(hidden, grid), TokenContext(
        temb=temb, text=text, text_tokens=text, grid=grid, conditions=conditions
    )


def position_ids(rows: int, columns: int, words: int, device: torch.device) -> Tensor:
    """Make a pipeline's position ids, (rows·columns·words, 4): image, row, column, word.

    Image tokens have rows and columns, and one word; text tokens have words, in one row and column.
    """
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in (1, rows, columns, words)))


@dataclass(kw_only=True, eq=False)
class DoubleBlock(Block):
    """A block with separate weights for image and text tokens, which share one modulation with the others."""

    def arguments(self, context: TokenContext) -> dict[str, Any]:
        return {name: value for name, value in context.conditions.items() if name != "temb_mod"}


@dataclass(kw_only=True, eq=False)
class SingleBlock(Block):
    """A block that processes text and image tokens as one sequence, and returns them apart."""

    def arguments(self, context: TokenContext) -> dict[str, Any]:
        kept = ("temb_mod", "image_rotary_emb", "joint_attention_kwargs")
        return {name: context.conditions[name] for name in kept} | {"split_hidden_states": True}


class Flux2Interface(PackedInterface):
    """How FLUX.2 is called: packed latents, stacked states of a language model, position ids of four axes.

    Guidance-distilled models (dev) belong to `Flux2Pipeline`, all others (klein) to `Flux2KleinPipeline`,
    whose own config says whether they were distilled to do without guidance (`is_distilled`).
    """

    pipeline_class = "Flux2Pipeline"
    pipeline_settings: ClassVar[Mapping[str, Any]] = {"is_distilled": False}
    text_inputs: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "joint_attention_dim"}
    max_sequence_length = 512  # all prompts are padded to it, and the models attend to the padding
    prompt_outputs = (0,)
    prompt_names = ("prompt_embeds",)
    concat_text = False  # experts share the language model, which fine-tunes do not change
    shared_config_keys = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "guidance_embeds",
        "axes_dims_rope",
        "rope_theta",
        "attention_head_dim",
    )
    guidance_scale = GUIDANCE

    def pipeline_name(self, text_encoders: int, config: Any = None) -> str:
        klein = config is not None and not config.guidance_embeds
        return "Flux2KleinPipeline" if klein else self.pipeline_class

    def encode_prompts(
        self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]
    ) -> dict[str, Any]:
        empty = encode([self.empty_prompt] * len(captions))[0]
        return {"prompt_embeds": encode(captions)[0], "negative_prompt_embeds": empty}

    def as_read(self, config: Any, tokenizer: Any, prompt: str) -> str:
        """Return the chat that the pipelines make of a prompt: dev's with a system message, or klein's."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        if config.guidance_embeds:
            return tokenizer.apply_chat_template(format_input([prompt])[0], tokenize=False)
        said = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": False}
        return tokenizer.apply_chat_template(said, tokenize=False, **options)

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        call = super().denoiser_kwargs(config, noisy, times, conditions)
        rows, columns = noisy.shape[-2] // self.patch, noisy.shape[-1] // self.patch
        words = conditions["encoder_hidden_states"].shape[1]
        call["img_ids"] = position_ids(rows, columns, 1, noisy.device)
        call["txt_ids"] = position_ids(1, 1, words, noisy.device)
        if config.guidance_embeds:
            call["guidance"] = torch.full((len(noisy),), GUIDANCE, device=noisy.device)
        return call

    def grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        return grid_of(call["img_ids"])

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        """Set the scheduler's steps as the stock pipelines do; the shift depends on size and steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        shift = compute_empirical_mu(size[0] * size[1] // self.patch**2, steps)
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=shift)

    def default_guidance(self, config: Any) -> float | None:
        return None if config.get("is_distilled") else self.guidance_scale

    def pipeline_guidance(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """Return the pipeline's arguments for guidance; see ModelInterface.pipeline_guidance.

        strength: an input of guidance-distilled models (dev), of classifier-free guidance for klein's base
                  models; models distilled to do without (klein) have none
        """
        if true is not None:
            raise UserError(
                f"true guidance {true:g} is not offered by the pipelines of FLUX.2; use --guidance"
            )
        if negative:
            raise UserError(
                "a negative prompt is not taken by the pipelines of FLUX.2, "
                "which guide away from the empty prompt or not at all; leave it out"
            )
        if config.get("is_distilled"):
            if strength is not None and strength > 1:
                raise UserError(
                    f"guidance {strength:g} changes nothing in models that were distilled without one "
                    "(FLUX.2 klein; is_distilled in model_index.json); leave it out"
                )
            return {"guidance_scale": 1.0}
        return {"guidance_scale": self.guidance_scale if strength is None else strength}

    def default_cfg_scale(self, config: Any) -> float:
        built_in = config.guidance_embeds or config.get("is_distilled")
        return 1.0 if built_in else self.guidance_scale

    def why_no_batched_guidance(self, config: Any) -> str:
        if config.guidance_embeds:
            return "these experts have theirs built in (guidance_embeds)"
        if config.get("is_distilled"):
            return "these experts were distilled to do without"
        return "the pipelines of these experts make its two passes one after another"


class Flux2Ensemble(TransformerEnsemble):
    """N `Flux2Transformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "flux2"
    interface = Flux2Interface()
    output = Flux2Transformer2DModelOutput
    block_lists = (
        BlockList("transformer_blocks", "D", "double", DoubleBlock, ("ff", "ff_context")),
        BlockList("single_transformer_blocks", "S", "single", SingleBlock),
    )
    patch_size = 1  # the pipelines pack the latents
    # Aggregators of three experts have 27 (klein 4B), 45 (klein 9B) and 106 million parameters (dev) at every
    # fourth stage, at all of them 105, 167 and 409 million; those of FLUX.1 and SD3 have about 60 million
    default_placement = "every-4"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
        ref_fixed_timestep: float = 0.0,
    ) -> Flux2Transformer2DModelOutput | tuple[Tensor]:
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D): the states of each expert in order
        Raises NotImplementedError for tokens of reference images, and for their cache.
        """
        if encoder_hidden_states is None or timestep is None or img_ids is None or txt_ids is None:
            raise ValueError("encoder_hidden_states, timestep, img_ids and txt_ids are needed; give all four")
        references = {
            "kv_cache": kv_cache,
            "kv_cache_mode": kv_cache_mode,
            "num_ref_tokens": num_ref_tokens,
            "ref_fixed_timestep": ref_fixed_timestep,
        }
        for name, given in references.items():
            if given:
                raise NotImplementedError(
                    f"{name} is for reference images, which an ensemble does not support; leave them out"
                )
        return self._predict(
            partial(embed, ids=(txt_ids, img_ids), grid=grid_of(img_ids), guidance=guidance),
            hidden_states,
            timestep,
            self.split_by_expert(encoder_hidden_states=encoder_hidden_states),
            encoder_hidden_states,
            PassOptions(),
            joint_attention_kwargs,
            return_dict,
        )
