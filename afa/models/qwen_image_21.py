"""The Qwen-Image 2.1 family: stages, call, drop-in denoiser.

`QwenImage21Transformer2DModel` is read as stages Q00 … Q31 and OUT. Blocks take text and image tokens as one
sequence. Text attends to the text before it only, and is modulated as at time 0: it is the same in all steps,
so pipelines keep its keys and values from the first step on (`kv_cache`). Every expert keeps its own.
A token stands for one latent pixel. Only the model's own sub-modules run.

Source of the architecture: Qwen team, Qwen-Image 2.1 (huggingface.co/Qwen/Qwen-Image-2.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from afa.denoiser.forward import PassOptions
from afa.models.qwen_image import QwenImageInterface, Shape, shape_of
from afa.models.transformer import BlockList, PackedInterface, TransformerEnsemble
from afa.stages.interface import ModelInterface
from afa.stages.stage import Stage
from afa.stages.tokens import Head, SequenceBlock, TokenContext, as_map, has_values, sequence_of

PROCESSOR = "QwenImage21AttnProcessor"  # takes segments of the sequence; the other one a compiled mask
SLOT = 4  # image tokens for which one entry of `img_mask` stands
Caches = Mapping[str, Any]  # stage name -> QwenImage21KVLayerCache: keys and values of the text in this block


@dataclass(kw_only=True)
class CachedContext(TokenContext):
    """The context of Qwen-Image 2.1.

    times:  (B + 1, E) time embeddings: of each image and, last, of time 0; (B, E) if the text shares the
            image's time
    caches: of this expert; None: the pass caches nothing
    """

    times: Tensor
    caches: Caches | None


@dataclass(kw_only=True, eq=False)
class CachedBlock(SequenceBlock):
    """One block; it fills or reads the cache of its keys and values of the text."""

    def arguments(self, context: TokenContext) -> dict[str, Any]:
        assert isinstance(context, CachedContext)
        cache = None if context.caches is None else context.caches[self.name]
        return {**context.conditions, "layer_cache": cache}


@dataclass(kw_only=True, eq=False)
class SequenceHead(Head):
    """The output norm and projection of the whole sequence, of which the image's part is the prediction."""

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        assert isinstance(context, CachedContext)
        sequence = sequence_of(context.text_tokens, image)
        normed = self.model.norm_out(sequence, context.times, context.conditions["target_token_mask"])
        patches: Tensor = self.model.proj_out(normed)
        return patches[:, -image.shape[1] :]


def embed(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    shape: Shape,
    mask: Tensor | None = None,
    caches: Caches | None = None,
    kv_cache_mode: str | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, CachedContext]:
    """Start the pass of one expert, as the stock forward does before its first block.

    sample:                (B, S, C) noisy latents
    timestep:              (B,) from 0 to 1
    encoder_hidden_states: (B, T, D) states of Qwen3-VL
    shape:                 of the image in tokens: (1, rows, columns)
    mask:                  (B, T), 1 for text, 0 for padding; None: no padding
    caches:                of the text's keys and values
    kv_cache_mode:         extract: fill the caches; cached: read them, if they are filled
    attention_kwargs:      not used, as in the stock forward
    Returns the image tokens as a map, and the context.
    """
    hidden, text = model.img_in(sample), model.txt_in(encoder_hidden_states)
    length, count = text.shape[1], hidden.shape[1]
    cached = (
        caches is not None
        and kv_cache_mode == "cached"
        and all(cache.k is not None for cache in caches.values())
    )
    start = length if cached else 0  # of the tokens that run
    with unset_fake_temporarily():  # the rotary embedding reads its values, also where a pass is only counted
        is_image = torch.arange(length + count, device="cpu") >= length
    times, targets = timestep.to(hidden.dtype), None
    if model.config.causal_condition:
        times = torch.cat([times, times.new_zeros(1)])
        targets = is_image[start:].to(hidden.device)
    temb = model.time_text_embed(times, hidden)
    text_mask = None if mask is None else mask.to(torch.bool)
    valid = None if text_mask is None else torch.cat([text_mask, text_mask.new_ones(len(text), count)], dim=1)
    conditions = {
        "modulation": model.modulation(temb),
        "rotary_emb": model.pos_embed([shape], is_image, device=hidden.device)[start:],
        "target_token_mask": targets,
    }
    if cached:
        conditions |= {
            "attention_mask": None if valid is None else valid[:, None, None],
            "kv_cache_mode": "cached",
        }
    else:
        conditions |= {"segments": [(0, length, True)], "key_valid": valid}
        if caches is not None:
            conditions |= {"kv_cache_mode": "extract", "cache_write_slice": slice(0, length)}
    return as_map(hidden, shape[1:]), CachedContext(
        temb=temb[: len(sample)],
        text=text,
        text_mask=text_mask,
        text_tokens=None if cached else text,
        grid=shape[1:],
        conditions=conditions,
        times=temb,
        caches=caches,
    )


class QwenImage21Interface(QwenImageInterface):
    """How Qwen-Image 2.1 is called: a token a pixel, states of Qwen3-VL and a mask, timesteps from 0 to 1."""

    pipeline_class = "QwenImage21Pipeline"
    text_inputs: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "context_in_dim"}
    token_side = 1
    reads_values = True
    prompt_offset = 3  # <|im_start|>, user, a new line
    guidance_scale = 1.0  # as its authors recommend; a stronger one costs a second pass
    shared_config_keys = (
        "in_channels",
        "out_channels",
        "context_in_dim",
        "axes_dims_rope",
        "attention_head_dim",
        "causal_condition",
    )

    def sample_size(self, config: Any) -> Any:
        return 64  # of latents of 1024 px, the default of the stock pipeline; no config records it

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        """Return all arguments of a call; see ModelInterface.denoiser_kwargs.

        Padding is cut to that of the longest prompt, since the image's positions follow those of the text.
        """
        states, mask = conditions["encoder_hidden_states"], conditions.get("encoder_hidden_states_mask")
        if mask is not None:
            length = int(mask.any(0).sum())
            states, mask = states[:, :length], None if mask[:, :length].all() else mask[:, :length]
        batch, _, rows, columns = noisy.shape
        slots = torch.arange(states.shape[1] + rows * columns // SLOT, device=noisy.device) >= states.shape[1]
        return {
            **PackedInterface.denoiser_kwargs(self, config, noisy, times, conditions),
            "encoder_hidden_states": states,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, rows, columns)]] * batch,
            "img_mask": slots.expand(batch, -1),
        }

    def with_prompt(
        self, config: Any, call: Mapping[str, Any], conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a call with another prompt, and so without the cache of its text."""
        times = torch.as_tensor(self.timestep_from_model(call["timestep"]))
        made = self.denoiser_kwargs(config, self.latents(call), times, dict(conditions))
        return {**made, "hidden_states": call["hidden_states"], "timestep": call["timestep"]}

    def to_latents(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Convert an output to latents; the stock model's output begins with text tokens."""
        return super().to_latents(output[:, -size[0] * size[1] :], size)

    def apply_guidance(self, uncond: Tensor, cond: Tensor, strength: float) -> Tensor:
        return ModelInterface.apply_guidance(self, uncond, cond, strength)


class QwenImage21Ensemble(TransformerEnsemble):
    """N `QwenImage21Transformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "qwen-image-2.1"
    interface = QwenImage21Interface()
    block_lists = (BlockList("transformer_blocks", "Q", stage=CachedBlock, feeds=("img_mlp",)),)
    patch_size = 1
    level = 0
    head = SequenceHead
    default_placement = "every-4"

    @classmethod
    def read_stages(cls, model: Any, /) -> tuple[Stage, ...]:
        """Read a model as stages. Raises ValueError for another attention processor than the default."""
        for name in {type(block.attn.processor).__name__ for block in model.transformer_blocks}:
            if name != PROCESSOR:
                raise ValueError(
                    f"the attention processor {name} is not supported; "
                    f"call set_attn_processor({PROCESSOR}()) on the transformer"
                )
        return super().read_stages(model)

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The blocks of all experts, block by block: a pipeline makes a cache for each of them."""
        every = (stage for same_stage in self.parallel_stages for stage in same_stage)
        return [stage.module for stage in every if isinstance(stage, CachedBlock)]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_shapes: Sequence[Any],
        img_mask: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict like the stock forward, with the same arguments, but for the image tokens only.

        encoder_hidden_states:      (B, T, D) for all experts, or (B, T, N·D): the states of each in order
        encoder_hidden_states_mask: (B, T), 1 for text, 0 for padding
        img_mask:                   (B, T + S / 4), False for text
        kv_cache:                   a QwenImage21KVCache with a layer for each of `transformer_blocks`. An
                                    expert fills its own in its first pass, also if that comes later than the
                                    pipeline's (some methods run one expert a step). Where text tokens are
                                    fused (text_stream), they depend on the step, and nothing is cached
        kv_cache_mode:              extract: fill all caches anew; cached: read those that are filled
        Raises NotImplementedError for input images (editing), and ValueError for what does not fit.
        """
        shape, mask = shape_of(img_shapes), encoder_hidden_states_mask
        batch, length = encoder_hidden_states.shape[:2]
        slots = length + shape[1] * shape[2] // SLOT
        if mask is not None and mask.shape != (batch, length):
            raise ValueError(
                f"encoder_hidden_states_mask is {tuple(mask.shape)}; "
                f"expected {(batch, length)}, as the states are"
            )
        if img_mask.shape[-1] != slots or (has_values(img_mask) and bool(img_mask[:, :length].any())):
            raise NotImplementedError(
                f"img_mask marks images inside a prompt of {length} tokens (editing), "
                "which an ensemble does not support; leave the images out"
            )
        text = self.split_by_expert(encoder_hidden_states=encoder_hidden_states)
        caches = self._caches(kv_cache, kv_cache_mode)
        return self._predict(
            partial(embed, shape=shape, mask=mask, kv_cache_mode=kv_cache_mode),
            hidden_states,
            timestep,
            [{**own, "caches": cache} for own, cache in zip(text, caches, strict=True)],
            encoder_hidden_states,
            PassOptions(),
            attention_kwargs,
            return_dict,
        )

    def _caches(self, cache: Any, mode: str | None) -> list[Caches | None]:
        """Return each expert's own layers of a pipeline's cache; None for each if nothing is cached.

        Raises ValueError for a cache that does not fit.
        """
        count, blocks = len(self.experts), self.stages[:-1]
        if (cache is None) != (mode is None) or mode not in (None, "extract", "cached"):
            raise ValueError(
                f"kv_cache_mode is {mode!r}; give extract or cached together with a kv_cache, or neither"
            )
        if cache is None or self.recipe.text_stream == "fused":
            return [None] * count
        if not self.config.causal_condition:
            raise ValueError(
                "kv_cache needs experts with causal_condition: else the text depends on the step"
            )
        layers = cache.layer_caches
        if len(layers) != count * len(blocks):
            raise ValueError(
                f"kv_cache has {len(layers)} layers; expected {count * len(blocks)}, "
                "one for each of the ensemble's transformer_blocks"
            )
        return [
            {stage.name: layers[place * count + index] for place, stage in enumerate(blocks)}
            for index in range(count)
        ]
