"""The Krea 2 family: stages, call, drop-in denoiser.

`Krea2Transformer2DModel` is read as stages K00 … K27 and OUT. Every block takes text and image tokens as one
sequence. Before the first block, a small transformer fuses the states of twelve layers of the text encoder;
it belongs to `embed`. Padding in the text is masked. Every expert keeps its own text tokens. Only the model's
own sub-modules run.

Source of the architecture: Krea AI, Krea 2 (github.com/krea-ai/krea-2).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.models.transformer import BlockList, PackedInterface, TransformerEnsemble
from afa.stages.stage import base_layer
from afa.stages.tokens import (
    LEVEL,
    Head,
    SequenceBlock,
    TokenContext,
    as_map,
    grid_of,
    image_ids,
)

TEXT_LAYERS = [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35]  # of Qwen3-VL, which the pipeline takes
TEMPLATE_END = 5  # tokens of the pipeline's template behind the prompt, within its length
DISTILLED_SHIFT = 1.15  # of the timesteps, at every size: what the pipeline uses for distilled models


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    position_ids: Tensor,
    mask: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, S, C) packed noisy latents
    timestep:              (B,) from 0 to 1
    encoder_hidden_states: (B, T, L, D) states of L layers of Qwen3-VL
    position_ids:          (T + S, 3): zeros for text tokens; zero, row, column for image tokens
    mask:                  (B, T) bool, False for padding; None: no padding
    attention_kwargs:      none of them is read: the stock blocks take none
    Returns the image tokens as a map, and the context.
    """
    text_mask = sequence_mask = None
    if mask is not None:
        image = mask.new_ones(sample.shape[:2])
        text_mask, sequence_mask = (
            part[:, None, None, :] for part in (mask, torch.cat([mask, image], dim=1))
        )
    temb = model.time_embed(timestep, dtype=sample.dtype)  # (B, 1, E)
    text = model.txt_in(model.text_fusion(encoder_hidden_states, attention_mask=text_mask))
    grid = grid_of(position_ids[text.shape[1] :])
    conditions = {
        "temb": model.time_mod_proj(F.gelu(temb, approximate="tanh")),
        "image_rotary_emb": model.rotary_emb(position_ids),
        "attention_mask": sequence_mask,
    }
    return as_map(model.img_in(sample), grid), TokenContext(
        temb=temb[:, 0],
        text=text,
        text_mask=None if mask is None else mask.to(torch.bool),
        text_tokens=text,
        grid=grid,
        conditions=conditions,
    )


class Krea2Head(Head):
    """The output layer, which is modulated by the time embedding."""

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        patches: Tensor = self.model.final_layer(image, context.temb[:, None])
        return patches

    def modules(self) -> list[object]:
        return [self.model.final_layer]


class Krea2Interface(PackedInterface):
    """How Krea 2 is called: packed latents, states of Qwen3-VL's layers and a mask, timesteps from 0 to 1.

    Guidance strengths are those of all families: 1 is no guidance. The pipeline's own `guidance_scale` is
    smaller by 1, and 0 is none there.
    """

    pipeline_class = "Krea2Pipeline"
    text_inputs: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "text_hidden_dim"}
    max_sequence_length = 512
    prompt_outputs = (0, 1)
    prompt_names = ("prompt_embeds", "prompt_embeds_mask")
    variable_length = True
    guidance_from_zero = True
    guidance_scale = 5.5  # guidance_scale=4.5 of the pipeline
    pipeline_settings: ClassVar[Mapping[str, Any]] = {
        "is_distilled": False,
        "text_encoder_select_layers": TEXT_LAYERS,
        "patch_size": 2,
    }
    shared_config_keys = (
        "in_channels",
        "attention_head_dim",
        "num_text_layers",
        "text_hidden_dim",
        "axes_dims_rope",
        "rope_theta",
    )
    marks_passes = False
    concat_text = False  # experts share the encoder of 4 billion parameters, which fine-tunes do not change

    def select_prompt_outputs(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return states and a mask without the padding, which stands before the template's last tokens.

        The pipeline pads every prompt to 512 tokens. Padding is masked and text tokens have no positions, so
        the prediction is the same, for less memory and time.
        """
        states, mask = encoded[0], encoded[1].to(torch.bool)
        lengths = mask.sum(1, keepdim=True)
        text_first = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
        rows = torch.arange(len(states), device=states.device)[:, None]
        kept = torch.arange(text_first.shape[1], device=states.device)[None] < lengths
        return states[rows, text_first], kept

    def encode_prompts(
        self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]
    ) -> dict[str, Any]:
        """Encode captions and the empty prompt, both as long as the pipeline pads them."""
        found = zip(self.prompt_names, encode(captions), strict=True)
        nothing = zip(self.prompt_names, encode([self.empty_prompt] * len(captions)), strict=True)
        return {**dict(found), **{f"negative_{name}": part for name, part in nothing}}

    def prompt_room(self, tokenizer: Any, longest: int) -> int:
        return longest - TEMPLATE_END

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": parts[0], "encoder_attention_mask": parts[1]}

    def empty_conditions(
        self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]
    ) -> dict[str, Any]:
        states = empty(batch, tokens, config["num_text_layers"], config["text_hidden_dim"])
        return {"encoder_hidden_states": states}

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        mask = conditions.get("encoder_attention_mask")
        if mask is not None and mask.all():
            mask = None  # attention without padding is faster
        # exact, whatever the dtype of the latents, as in the pipeline
        ids = image_ids((noisy.shape[-2], noisy.shape[-1]), noisy.new_zeros((), dtype=torch.float32))
        return {
            **super().denoiser_kwargs(config, noisy, times, conditions),
            "timestep": self.timestep_to_model(times.float()).to(noisy.dtype),
            "position_ids": _with_text(ids, conditions["encoder_hidden_states"].shape[1]),
            "encoder_attention_mask": mask,
        }

    def with_prompt(
        self, config: Any, call: Mapping[str, Any], conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        ids = call["position_ids"][call["encoder_hidden_states"].shape[1] :]
        found = super().with_prompt(config, call, conditions)
        return {**found, "position_ids": _with_text(ids, found["encoder_hidden_states"].shape[1])}

    def grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        return grid_of(call["position_ids"][call["encoder_hidden_states"].shape[1] :])

    def apply_guidance(self, uncond: Tensor, cond: Tensor, strength: float) -> Tensor:
        return cond + (strength - 1) * (cond - uncond)  # in the pipeline's own order

    def default_guidance(self, config: Any) -> float | None:
        return 1.0 if config.get("is_distilled") else self.guidance_scale

    def why_no_batched_guidance(self, config: Any) -> str:
        return "the pipeline of these experts makes its two passes one after another"

    def scheduler_changes(self, config: Any) -> dict[str, Any]:
        shift = {"base_shift": DISTILLED_SHIFT, "max_shift": DISTILLED_SHIFT}
        return shift if config.get("is_distilled") else {}


def _with_text(ids: Tensor, length: int) -> Tensor:
    """Return the position ids of image tokens (S, 3) behind those of text tokens, which are zeros."""
    return torch.cat([ids.new_zeros(length, 3), ids])


class Krea2Ensemble(TransformerEnsemble):
    """N `Krea2Transformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "krea2"
    interface = Krea2Interface()
    block_lists = (BlockList("transformer_blocks", "K", stage=SequenceBlock, feeds=("ff",)),)
    # 28 blocks, 6144 channels: aggregators of three experts have 207 million parameters at all stages, and
    # 55 million at every fourth, similar to FLUX.1 and SD3
    default_placement = "every-4"

    @classmethod
    def hidden_size(cls, model: Any) -> int:
        return int(model.hidden_size)

    @classmethod
    def read_head(cls, model: Any) -> Head:
        channels = base_layer(model.final_layer.linear).out_features
        return Krea2Head(name="OUT", channels=channels, level=LEVEL, model=model)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        position_ids: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states:  (B, T, L, D) for all experts, or (B, T, L, N·D): the states of each in order
        encoder_attention_mask: (B, T) bool, False for padding
        Raises NotImplementedError for position ids of several images.
        """
        text, length = encoder_hidden_states.shape[:2], encoder_hidden_states.shape[1]
        if position_ids.shape != (length + hidden_states.shape[1], 3):
            raise ValueError(
                f"position_ids are {tuple(position_ids.shape)}; expected "
                f"{(length + hidden_states.shape[1], 3)}, a row for each text token and each image token"
            )
        if encoder_attention_mask is not None and encoder_attention_mask.shape != text:
            raise ValueError(
                f"encoder_attention_mask is {tuple(encoder_attention_mask.shape)}; "
                f"expected {tuple(text)}, as the states are"
            )
        return self._predict(
            partial(embed, position_ids=position_ids, mask=encoder_attention_mask),
            hidden_states,
            timestep,
            self.split_by_expert(encoder_hidden_states=encoder_hidden_states),
            encoder_hidden_states,
            PassOptions(),
            attention_kwargs,
            return_dict,
        )
