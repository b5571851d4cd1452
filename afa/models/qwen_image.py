"""The Qwen-Image family: stages, call, drop-in denoiser.

`QwenImageTransformer2DModel` is read as stages Q00 … Q59 and OUT. Every block has separate weights for image
and text tokens, which attend to each other; padding in the text is masked. Every expert keeps its own text
tokens. Only the model's own sub-modules run.

Source of the architecture: Wu et al., Qwen-Image, arXiv:2508.02324.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.forward import PassOptions
from afa.models.transformer import (
    SEPARATE_PASSES,
    BlockList,
    PackedInterface,
    TransformerEnsemble,
    block_residuals,
)
from afa.stages.stage import Stage
from afa.stages.tokens import TokenContext, as_map, pack, unpack

# config switches -> the variants that have them; guidance_embeds: the stock forward fails on such a model
VARIANTS = {
    "zero_cond_t": "for editing",
    "use_additional_t_cond": "for layers",
    "use_layer3d_rope": "for layers",
    "guidance_embeds": "distilled",
}
Shape = tuple[int, int, int]


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    shape: Shape,
    mask: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, S, C) packed noisy latents
    timestep:              (B,) from 0 to 1
    encoder_hidden_states: (B, T, D) states of Qwen2.5-VL
    shape:                 of the image in tokens: (1, rows, columns)
    mask:                  (B, T), 1 for text, 0 for padding; None: no padding
    Returns the image tokens as a map, and the context.
    """
    hidden = model.img_in(sample)
    temb = model.time_text_embed(timestep.to(hidden.dtype), hidden)
    text = model.txt_in(model.txt_norm(encoder_hidden_states))
    text_mask = None if mask is None else mask.to(torch.bool)
    conditions = {
        "encoder_hidden_states_mask": text_mask,
        "temb": temb,
        "image_rotary_emb": model.pos_embed([shape], max_txt_seq_len=text.shape[1], device=hidden.device),
        "joint_attention_kwargs": attention_kwargs,
    }
    grid = shape[1:]
    return as_map(hidden, grid), TokenContext(
        temb=temb, text=text, text_mask=text_mask, text_tokens=text, grid=grid, conditions=conditions
    )


def shape_of(shapes: Sequence[Any]) -> Shape:
    """Return the one shape of all images in tokens: (1, rows, columns).

    shapes: for each image, one shape or a list of shapes, as pipelines pass them
    Raises NotImplementedError for several shapes: input images (editing), layers, images of different sizes.
    """
    each = [list(of_image) if isinstance(of_image, list) else [of_image] for of_image in shapes]
    first = each[0]
    if len(first) != 1 or first[0][0] != 1:
        raise NotImplementedError(
            f"img_shapes {first} has tokens of several images (editing, layers), "
            "which an ensemble does not support; leave them out"
        )
    if any(other != first for other in each):
        raise NotImplementedError(
            "images of different sizes in one batch (img_shapes) are not supported by an ensemble; "
            "draw them one size at a time"
        )
    frames, rows, columns = first[0]
    return int(frames), int(rows), int(columns)


class QwenImageInterface(PackedInterface):
    """How Qwen-Image is called: packed latents, states of Qwen2.5-VL and a mask, timesteps from 0 to 1."""

    pipeline_class = "QwenImagePipeline"
    text_inputs: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "joint_attention_dim"}
    max_sequence_length = 512  # at most; prompts are padded to the longest of the batch
    prompt_outputs = (0, 1)
    prompt_names = ("prompt_embeds", "prompt_embeds_mask")
    variable_length = True
    empty_prompt = " "  # as in the examples of its authors
    guidance_scale = 4.0
    shared_config_keys: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "axes_dims_rope",
        "attention_head_dim",
    )
    concat_text = False  # experts share the encoder of 7 billion parameters, which fine-tunes do not change

    def select_prompt_outputs(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return states and a mask; the pipeline's mask is None if there is no padding."""
        states, mask, *_ = encoded
        everything = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return states, everything if mask is None else mask.to(torch.bool)

    def encode_prompts(
        self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]
    ) -> dict[str, Any]:
        found = zip(self.prompt_names, self.select_prompt_outputs(encode(captions)), strict=True)
        nothing = zip(
            self.prompt_names,
            self.select_prompt_outputs(encode([self.empty_prompt] * len(captions))),
            strict=True,
        )
        return {**dict(found), **{f"negative_{name}": part for name, part in nothing}}

    def guidance_kwargs(self, strength: float) -> dict[str, Any]:
        return {"true_cfg_scale": strength}

    def pipeline_guidance(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """Return the pipeline's arguments for guidance; see ModelInterface.pipeline_guidance.

        The pipelines apply guidance only if they get a negative prompt.
        """
        found = super().pipeline_guidance(config, count, strength, negative, true)
        if negative is None and found["true_cfg_scale"] > 1:
            found["negative_prompt"] = [self.empty_prompt] * count
        return found

    def why_no_batched_guidance(self, config: Any) -> str:
        return SEPARATE_PASSES

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": parts[0], "encoder_hidden_states_mask": parts[1]}

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        mask = conditions.get("encoder_hidden_states_mask")
        if mask is not None and mask.all():
            mask = None  # as in the pipeline: attention without padding is faster
        size = (noisy.shape[-2] // self.patch, noisy.shape[-1] // self.patch)
        return {
            **super().denoiser_kwargs(config, noisy, times, conditions),
            "img_shapes": [[(1, *size)]] * len(noisy),
            "encoder_hidden_states_mask": mask,
        }

    def grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        return shape_of(call["img_shapes"])[1:]

    def apply_guidance(self, uncond: Tensor, cond: Tensor, strength: float) -> Tensor:
        """Apply guidance as the pipelines do: every token keeps the norm of the conditional prediction."""
        guided, target = pack(super().apply_guidance(uncond, cond, strength)), pack(cond)
        scale = target.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * scale, (cond.shape[-2], cond.shape[-1]))


class QwenImageEnsemble(TransformerEnsemble):
    """N `QwenImageTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "qwen-image"
    interface = QwenImageInterface()
    block_lists = (BlockList("transformer_blocks", "Q"),)
    unused_in_last = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp")
    # 60 blocks, 3072 channels: aggregators of three experts have 247 million parameters at all stages, and
    # 64 million at every fourth, similar to FLUX.1 and SD3
    default_placement = "every-4"

    @classmethod
    def read_stages(cls, model: Any, /) -> tuple[Stage, ...]:
        """Read a model as stages. Raises ValueError, naming the switch, for unsupported variants."""
        for switch, variant in VARIANTS.items():
            if model.config.get(switch):
                raise ValueError(
                    f"{switch} (a variant {variant}) is not supported; "
                    "only Qwen-Image itself is, which draws images from text"
                )
        return super().read_stages(model)

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
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states:      (B, T, D) for all experts, or (B, T, N·D): the states of each in order
        encoder_hidden_states_mask: (B, T), 1 for text, 0 for padding
        Raises NotImplementedError for `guidance` (stock models fail on it, too), for additional_t_cond
        (layers), and for images of several shapes (editing).
        """
        if encoder_hidden_states is None or timestep is None or img_shapes is None:
            raise ValueError("encoder_hidden_states, timestep and img_shapes are needed; give all three")
        for name, given in (("guidance", guidance), ("additional_t_cond", additional_t_cond)):
            if given is not None:
                raise NotImplementedError(
                    f"{name} is not supported by an ensemble of Qwen-Image experts; leave it out"
                )
        shape, mask = shape_of(img_shapes), encoder_hidden_states_mask
        if mask is not None and mask.shape != encoder_hidden_states.shape[:2]:
            raise ValueError(
                f"encoder_hidden_states_mask is {tuple(mask.shape)}; "
                f"expected {tuple(encoder_hidden_states.shape[:2])}, as the states are"
            )
        return self._predict(
            partial(embed, shape=shape, mask=mask),
            hidden_states,
            timestep,
            self.split_by_expert(encoder_hidden_states=encoder_hidden_states),
            encoder_hidden_states,
            PassOptions(residuals=block_residuals(self.stages[:-1], controlnet_block_samples, shape[1:])),
            attention_kwargs,
            return_dict,
        )
