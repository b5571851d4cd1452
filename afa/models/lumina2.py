"""The Lumina 2 family: stages, call, drop-in denoiser.

`Lumina2Transformer2DModel` is read as stages N00, N01 (the noise refiner: image tokens only), L00 … L25
(caption and image tokens as one sequence) and OUT. The context refiner, which sees captions only, belongs to
the embedding. Every expert keeps its own caption tokens. Only the model's own sub-modules run.

In the stock sequence, an image follows its own caption without a gap, and padding comes last. Between stages
the tokens are apart: those of the captions, padded to the longest, and those of the images.

Time in the model rises from 0 (noise) to 1 (image), and it predicts image minus noise. The stage OUT predicts
noise minus image, as schedulers of flows expect.

Source of the architecture: Qin et al., Lumina-Image 2.0, arXiv:2503.21758.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.models.transformer import (
    SEPARATE_PASSES,
    BlockList,
    RisingInterface,
    UnpackedEnsemble,
    refuse_attention_options,
)
from afa.stages.stage import base_layer
from afa.stages.tokens import (
    LEVEL,
    Head,
    RefinedContext,
    RefinerBlock,
    SequenceBlock,
    TokenContext,
    as_map,
    as_tokens,
    fold,
    has_values,
    mask_of,
    sequence_of,
    set_steps,
)

CHANNELS = 16  # of the latents of all published models
# what the stock pipeline puts before a prompt, but not before the negative one
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> "
)


@dataclass(kw_only=True)
class Lumina2Context(RefinedContext):
    """The context of a Lumina 2 expert.

    order:   (B, T + S) places, among caption tokens and then image tokens, of the stock sequence's tokens;
             None: the same order, as all captions are equally long
    inverse: of this order
    """

    order: Tensor | None
    inverse: Tensor | None


@dataclass(kw_only=True, eq=False)
class Lumina2Layer(SequenceBlock):
    """One block of the whole sequence: caption tokens, image tokens, padding."""

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        assert isinstance(context, Lumina2Context)
        sequence = self.module(stock_sequence(image, context), **self.arguments(context))
        return split(sequence, image.shape[1], context)


@dataclass(kw_only=True, eq=False)
class Lumina2Head(Head):
    """The output layer, of the whole sequence as in the stock forward. It predicts noise minus image."""

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        assert isinstance(context, Lumina2Context)
        patches = self.model.norm_out(stock_sequence(image, context), context.temb)
        return -split(patches, image.shape[1], context)[1]

    def modules(self) -> list[object]:
        return [self.model.norm_out]


def stock_sequence(image: Tensor, context: Lumina2Context) -> Tensor:
    """Join caption tokens (of the context) and image tokens (B, S, C) in the order of the stock forward."""
    return arranged(sequence_of(context.text_tokens, image), context.order)


def split(sequence: Tensor, count: int, context: Lumina2Context) -> tuple[Tensor, Tensor]:
    """Undo `stock_sequence`: return caption tokens and image tokens. count: S, the number of the latter"""
    tokens = arranged(sequence, context.inverse)
    return tokens[:, :-count], tokens[:, -count:]


def arranged(sequence: Tensor, places: Tensor | None) -> Tensor:
    """Take the tokens at these places: (B, T, C) and (B, T) -> (B, T, C). None: as they are"""
    return sequence if places is None else sequence.take_along_dim(places[..., None], dim=1)


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    mask: Tensor,
    lengths: Sequence[int],
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Lumina2Context]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, C, H, W) noisy latents
    timestep:              (B,) from 0 (noise) to 1 (image)
    encoder_hidden_states: (B, T, D) states of Gemma 2
    mask:                  (B, T), 1 for text, 0 for padding
    lengths:               B, of the captions: as many first tokens of each are read
    Returns the image tokens as a map, and the context.
    """
    temb, text = model.time_caption_embed(sample, timestep, encoder_hidden_states)
    patches = fold(sample)
    grid = patches.shape[-2], patches.shape[-1]
    ids = position_ids(lengths, text.shape[1], grid, sample.device)
    freqs = model.rope_embedder._get_freqs_cis(ids)
    words, pixels = freqs.tensor_split([text.shape[1]], dim=1)
    for layer in model.context_refiner:
        text = layer(text, mask, words)
    image, longest = model.x_embedder(as_tokens(patches)), max(lengths)
    text, whole = text[:, :longest], torch.cat([words[:, :longest], pixels], dim=1)
    order = inverse = sequence_mask = None
    if min(lengths) < longest:
        order = stock_order(lengths, image.shape[1], sample.device)
        inverse = order.argsort(dim=1)
        sequence_mask = mask_of([length + image.shape[1] for length in lengths], whole)
    return as_map(image, grid), Lumina2Context(
        temb=temb,
        text=text,
        text_mask=mask_of(lengths, text),
        text_tokens=text,
        grid=grid,
        conditions={
            "attention_mask": sequence_mask,
            "image_rotary_emb": arranged(whole, order),
            "temb": temb,
        },
        refining={"attention_mask": None, "image_rotary_emb": pixels, "temb": temb},
        order=order,
        inverse=inverse,
    )


def position_ids(lengths: Sequence[int], tokens: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return the positions of caption and image tokens, (B, T + S, 3): place in the caption, row, column.

    An image stands behind the last word of its own caption; padding at 0.
    lengths: B, of the captions in tokens
    tokens:  T, of the padded captions
    """
    ids = torch.zeros(len(lengths), tokens + grid[0] * grid[1], 3, dtype=torch.int64, device=device)
    words = torch.arange(tokens, device=device)
    ends = torch.tensor(lengths, device=device)[:, None]
    ids[:, :tokens, 0] = words * (words < ends)
    ids[:, tokens:, 0] = ends
    ids[:, tokens:, 1] = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    ids[:, tokens:, 2] = torch.arange(grid[1], device=device).repeat(grid[0])
    return ids


def stock_order(lengths: Sequence[int], pixels: int, device: torch.device) -> Tensor:
    """Return the order of the stock sequence, see Lumina2Context. pixels: S, the number of image tokens"""
    longest = max(lengths)
    places = torch.arange(longest + pixels, device=device)
    ends = torch.tensor(lengths, device=device)[:, None]
    behind = torch.where(places < ends + pixels, places - ends + longest, places - pixels)
    return torch.where(places < ends, places, behind)


def lengths_of(mask: Tensor) -> list[int]:
    """Return the lengths of captions, in tokens. mask: (B, T); all of it is text if it has no values"""
    if not has_values(mask):
        return [mask.shape[1]] * mask.shape[0]
    return [int(length) for length in mask.sum(dim=1).tolist()]


class Lumina2Interface(RisingInterface):
    """How Lumina 2 is called: states of Gemma 2 and a mask, timesteps from 0 to 1 that rise."""

    pipeline_class = "Lumina2Pipeline"
    text_inputs: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "cap_feat_dim"}
    max_sequence_length = 256
    prompt_outputs = (0, 1)
    negative_outputs = (2, 3)
    prompt_names = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    prompt_offset = 1  # the tokenizer's own first token, <bos>
    variable_length = True
    marks_passes = False
    reads_values = True
    guidance_scale = 4.0
    shared_config_keys = (
        "in_channels",
        "out_channels",
        "cap_feat_dim",
        "axes_dim_rope",
        "num_attention_heads",
        "num_kv_heads",
    )
    concat_text = False  # experts share the encoder of 2.6 billion parameters, which fine-tunes do not change

    def select_prompt_outputs(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return states and a mask, without the padding that is behind every prompt of the batch."""
        states, mask = encoded[0], encoded[1].to(torch.bool)
        longest = int(mask.sum(1).max())
        return states[:, :longest], mask[:, :longest]

    def as_read(self, config: Any, tokenizer: Any, prompt: str) -> str:
        return SYSTEM_PROMPT + prompt

    def prompt_room(self, tokenizer: Any, longest: int) -> int:
        words = SYSTEM_PROMPT.rstrip()  # the space belongs to the prompt's first token
        return longest - len(tokenizer(words, add_special_tokens=False).input_ids)

    def why_no_batched_guidance(self, config: Any) -> str:
        return SEPARATE_PASSES

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": parts[0], "encoder_attention_mask": parts[1]}

    def empty_conditions(
        self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]
    ) -> dict[str, Any]:
        return {
            **super().empty_conditions(config, batch, tokens, empty),
            "encoder_attention_mask": torch.ones_like(empty(batch, tokens), dtype=torch.bool),
        }

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        """Set the steps as the pipeline does, which takes the number of channels for that of image tokens."""
        set_steps(scheduler, steps, CHANNELS)

    def apply_guidance(self, uncond: Tensor, cond: Tensor, strength: float) -> Tensor:
        """Apply guidance as the pipeline does: every row of latents keeps the norm of the conditional one."""
        guided = super().apply_guidance(uncond, cond, strength)
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class Lumina2Ensemble(UnpackedEnsemble):
    """N `Lumina2Transformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "lumina2"
    interface = Lumina2Interface()
    block_lists = (
        BlockList("noise_refiner", "N", "refiner", RefinerBlock, ("feed_forward",)),
        BlockList("layers", "L", "layer", Lumina2Layer, ("feed_forward",)),
    )
    # 28 blocks, 2304 channels: aggregators of three experts (sabw) have 90 million parameters at all stages,
    # and 24 million at every fourth
    default_placement = "every-4"

    @classmethod
    def hidden_size(cls, model: Any) -> int:
        return int(model.config.hidden_size)

    @classmethod
    def read_head(cls, model: Any) -> Head:
        channels = base_layer(model.norm_out.linear_2).out_features
        return Lumina2Head(name="OUT", channels=channels, level=LEVEL, model=model)

    @property
    def widths(self) -> tuple[int, int]:
        first: Any = self.experts[0]
        time = first.time_caption_embed.timestep_embedder
        return base_layer(time.linear_2).out_features, self.hidden_size(first)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states:  (B, T, D) for all experts, or (B, T, N·D): the states of each in order
        encoder_attention_mask: (B, T), 1 for text, 0 for the padding behind it
        Raises NotImplementedError for attention options other than the LoRA's scale, and ValueError for a
        mask that does not fit.
        """
        refuse_attention_options(attention_kwargs, "Lumina 2")
        text = encoder_hidden_states.shape[:2]
        if encoder_attention_mask.shape != text:
            raise ValueError(
                f"encoder_attention_mask is {tuple(encoder_attention_mask.shape)}; "
                f"expected {tuple(text)}, as the states are"
            )
        mask, lengths = encoder_attention_mask, lengths_of(encoder_attention_mask)
        return self._predict(
            partial(embed, mask=mask, lengths=lengths),
            hidden_states,
            timestep,
            self.split_by_expert(encoder_hidden_states=encoder_hidden_states),
            encoder_hidden_states,
            PassOptions(),
            attention_kwargs,
            return_dict,
        )
