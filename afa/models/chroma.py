"""The Chroma family: stages, call, drop-in denoiser.

`ChromaTransformer2DModel` is FLUX.1 with another modulation, and is read as the same stages: D00 … D18
(double blocks), S00 … S37 (single blocks) and OUT. Blocks have no modulation layers of their own: one network
computes the modulation of all blocks from the timestep, and each stage takes its part. The text is T5's
alone, padded to 512 tokens; an attention mask marks the prompt and the first token of the padding. Every
expert keeps its own text tokens. Only the model's own sub-modules run.

Source of the architecture: lodestones, Chroma (huggingface.co/lodestones/Chroma1-HD).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.models.flux import residuals_of
from afa.models.transformer import SEPARATE_PASSES, TIMES, BlockList, PackedInterface, TransformerEnsemble
from afa.stages.tokens import Block, Head, SequenceBlock, TokenContext, as_map, flat_ids, grid_of, image_ids


@dataclass(kw_only=True)
class ChromaContext(TokenContext):
    """The context of a Chroma expert.

    modulation: shifts, scales and gates (E: width of tokens), by the group of the stages that take them:
                double: (B, blocks, 12, E), six for image tokens and six for text tokens of each block
                single: (B, blocks, 3, E)
                out:    (B, 2, E), of the output norm
    """

    modulation: dict[str, Tensor]


class ModulatedBlock(Block):
    """A double block; it takes its part of the modulation."""

    def arguments(self, context: TokenContext) -> dict[str, Any]:
        assert isinstance(context, ChromaContext)
        return {**context.conditions, "temb": context.modulation[self.group][:, self.index]}


class SingleBlock(ModulatedBlock, SequenceBlock):
    """A single block, which processes text and image tokens as one sequence."""


class ModulatedHead(Head):
    """The output norm and projection; the norm takes its part of the modulation."""

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        assert isinstance(context, ChromaContext)
        patches: Tensor = self.model.proj_out(self.model.norm_out(image, context.modulation["out"]))
        return patches


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    ids: Sequence[Tensor],
    grid: tuple[int, int],
    mask: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, ChromaContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, S, C) packed noisy latents
    timestep:              (B,) from 0 to 1
    encoder_hidden_states: (B, T, D) states of T5
    ids:                   position ids of text tokens (T, 3) and image tokens (S, 3)
    grid:                  rows and columns of image tokens
    mask:                  (B, T + S) attention mask of text and image tokens; None: no padding
    Returns the image tokens as a map, and the context.
    """
    hidden = model.x_embedder(sample)
    places = model.time_text_embed(timestep.to(hidden.dtype) * TIMES)  # (B, places of the modulation, …)
    double, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
    singles, images, texts, out = model.distilled_guidance_layer(places).split(
        [3 * single, 6 * double, 6 * double, 2], dim=1
    )
    text = model.context_embedder(encoder_hidden_states)
    length = text.shape[1]
    return as_map(hidden, grid), ChromaContext(
        temb=places[:, 0, : time_width(model.config)],
        text=text,
        text_mask=None if mask is None else mask[:, :length].to(torch.bool),
        text_tokens=text,
        grid=grid,
        conditions={
            "image_rotary_emb": model.pos_embed(torch.cat([flat_ids(part) for part in ids], dim=0)),
            "attention_mask": mask,
            "joint_attention_kwargs": attention_kwargs,
        },
        modulation={
            "double": torch.cat([part.unflatten(1, (double, 6)) for part in (images, texts)], dim=2),
            "single": singles.unflatten(1, (single, 3)),
            "out": out,
        },
    )


def time_width(config: Any) -> int:
    """Return the width of the sinusoidal embedding of the timestep.

    Each row of the modulation network's input begins with it; guidance (always 0, of the same width) and the
    number of the row follow.
    """
    return int(config.approximator_num_channels) // 4


class ChromaInterface(PackedInterface):
    """How Chroma is called: packed latents, states of T5, position ids, a mask of text and image tokens."""

    pipeline_class = "ChromaPipeline"
    text_inputs: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "joint_attention_dim"}
    max_sequence_length = 512  # of T5; every prompt is padded to it
    prompt_outputs = (0, 2)
    prompt_names = ("prompt_embeds", "prompt_attention_mask")
    concat_text = True
    guidance_scale = 5.0
    marks_passes = False
    shared_config_keys = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "axes_dims_rope",
        "attention_head_dim",
        "approximator_num_channels",
    )

    def encode_prompts(
        self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]
    ) -> dict[str, Any]:
        """Encode captions; the pipeline encodes the empty prompt of guidance beside them."""
        states, _, mask, no_states, _, no_mask = encode(captions)
        prompts = {"": (states, mask), "negative_": (no_states, no_mask)}
        return {
            f"{kind}{name}": part
            for kind, parts in prompts.items()
            for name, part in zip(self.prompt_names, parts, strict=True)
        }

    def why_no_batched_guidance(self, config: Any) -> str:
        return SEPARATE_PASSES

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": parts[0], "attention_mask": parts[1]}

    def empty_conditions(
        self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]
    ) -> dict[str, Any]:
        return {
            **super().empty_conditions(config, batch, tokens, empty),
            "attention_mask": torch.ones_like(empty(batch, tokens)),
        }

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        call = super().denoiser_kwargs(config, noisy, times, conditions)
        mask = conditions["attention_mask"]
        everything = mask.new_ones(len(noisy), call["hidden_states"].shape[1])
        call["attention_mask"] = torch.cat([mask, everything], dim=1)  # image tokens are never masked
        call["img_ids"] = image_ids((noisy.shape[-2], noisy.shape[-1]), noisy)
        call["txt_ids"] = noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3)
        return call

    def grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        return grid_of(call["img_ids"])


class ChromaEnsemble(TransformerEnsemble):
    """N `ChromaTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "chroma"
    interface = ChromaInterface()
    block_lists = (
        BlockList("transformer_blocks", "D", "double", ModulatedBlock),
        BlockList("single_transformer_blocks", "S", "single", SingleBlock),
    )
    head = ModulatedHead
    patch_size = 1  # the pipelines pack the latents
    # FLUX.1's 57 blocks: aggregators of three experts have 212 million parameters at all stages, and
    # 54 million at every fourth, similar to FLUX.1 and SD3
    default_placement = "every-4"

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of the time embedding (E) and of the text states (D) that aggregators see.

        There is no vector of the time as wide as the tokens: modulations differ by stage. Aggregators see the
        sinusoidal embedding of the timestep, the only vector of the model that tells the time and nothing
        else; it is the same in all experts.
        """
        return time_width(self.config), self.hidden_size(self.experts[0])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D): the states of each expert in order
        attention_mask:        (B, T + S) of text and image tokens. As in the stock model, a mask of numbers,
                               which the pipelines pass, is added to the logits of the attention, and only
                               a mask of bools hides tokens
        Raises NotImplementedError for IP-Adapter, and for tokens of reference images.
        """
        if encoder_hidden_states is None or timestep is None or img_ids is None or txt_ids is None:
            raise ValueError("encoder_hidden_states, timestep, img_ids and txt_ids are needed; give all four")
        expected = (len(hidden_states), encoder_hidden_states.shape[1] + hidden_states.shape[1])
        if attention_mask is not None and attention_mask.shape != expected:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; "
                f"expected {expected}: a column for every text token and every image token"
            )
        grid = grid_of(img_ids)
        return self._predict(
            partial(embed, ids=(txt_ids, img_ids), grid=grid, mask=attention_mask),
            hidden_states,
            timestep,
            self.split_by_expert(encoder_hidden_states=encoder_hidden_states),
            encoder_hidden_states,
            PassOptions(
                residuals=residuals_of(
                    self.stages,
                    controlnet_block_samples,
                    controlnet_single_block_samples,
                    grid,
                    repeat=controlnet_blocks_repeat,
                )
            ),
            joint_attention_kwargs,
            return_dict,
        )
