"""Qwen-Image: stages, call, drop-in denoiser.

The Qwen-Image family: `QwenImageTransformer2DModel` as stages Q00 … Q59 and OUT.

Every block has weights of its own for image and text tokens, which attend to each other; padding among the text is masked.
Every expert keeps its own text tokens. Only the model's own sub-modules run. Source of the architecture: Wu et al.,
Qwen-Image, arXiv:2508.02324.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afa.denoiser.base import EnsembleDenoiser, attention_options
from afa.denoiser.forward import Residuals
from afa.denoiser.lora import lora_scaled
from afa.models import qwen_image
from afa.stages.call import Call
from afa.stages.stage import Stage, plain
from afa.stages.tokens import LEVEL, Block, Head, TokenTrace, as_map, as_tokens, pack, set_steps, unpack

TIMES = 1000  # of a schedule: its models are told a share of them
SIDE = 128  # of the latents of 1024 px, what its pipeline draws by default; the config says nothing
VARIANTS = {  # switches of the config, and what has them; guidance_embeds: the stock forward fails on such a model
    "zero_cond_t": "for editing",
    "use_additional_t_cond": "for layers",
    "use_layer3d_rope": "for layers",
    "guidance_embeds": "distilled",
}
SILENT = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp")  # of the last block, whose text nobody reads
Shape = tuple[int, int, int]


def stages(model: Any) -> tuple[Stage, ...]:
    """Read a `QwenImageTransformer2DModel` as its stages: 60 blocks and the head.

    Raises ValueError, naming the switch, for variants that this family cannot walk, and for another patch size.
    """
    config = model.config
    for switch, variant in VARIANTS.items():
        if config.get(switch):
            raise ValueError(
                f"{switch} (a variant {variant}) is not supported; only Qwen-Image itself is, which draws images from text"
            )
    if config.patch_size != 2**LEVEL:
        raise ValueError(f"patch_size {config.patch_size} is not supported; only {2**LEVEL} is")
    last = len(model.transformer_blocks) - 1
    blocks = [
        Block(
            name=f"Q{index:02}",
            channels=model.inner_dim,
            level=LEVEL,
            block=f"transformer_blocks.{index}",
            module=block,
            silent=SILENT if index == last else (),
        )
        for index, block in enumerate(model.transformer_blocks)
    ]
    return (*blocks, Head(name="OUT", channels=plain(model.proj_out).out_features, level=LEVEL, model=model))


def widths(model: Any) -> tuple[int, int]:
    """Widths of the time embedding (E) and of the text states (D)."""
    return model.inner_dim, model.txt_in.out_features


def begin(
    model: Any,
    tokens: Tensor,
    timestep: Tensor,
    text: Tensor,
    shape: Shape,
    mask: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenTrace]:
    """Start a pass: packed noisy latents (B, S, C), text (B, T, D), shape of the image in tokens (1, rows, columns).

    timestep (B,) from 0 to 1; mask (B, T) with 1 for tokens to keep; options: of the attention processors.
    -> image tokens as a map, the trace.
    """
    hidden = model.img_in(tokens)
    temb = model.time_text_embed(timestep.to(hidden.dtype), hidden)
    states = model.txt_in(model.txt_norm(text))
    kept = None if mask is None else mask.to(torch.bool)
    rotary = model.pos_embed([shape], max_txt_seq_len=text.shape[1], device=hidden.device)
    conditions = {
        "encoder_hidden_states_mask": kept,
        "temb": temb,
        "image_rotary_emb": rotary,
        "joint_attention_kwargs": options,
    }
    grid = shape[1:]
    return as_map(hidden, grid), TokenTrace(
        temb=temb, text=states, kept=kept, stream=states, grid=grid, conditions=conditions
    )


def shape_of(shapes: Sequence[Any]) -> Shape:
    """The one shape of all images, (1, rows, columns) in tokens, of what pipelines pass: a shape, or a list of them, for each image.

    Raises NotImplementedError for several shapes: images beside the one that is drawn (editing), layers, images of different sizes.
    """
    each = [list(of_image) if isinstance(of_image, list) else [of_image] for of_image in shapes]
    first = each[0]
    if len(first) != 1 or first[0][0] != 1:
        raise NotImplementedError(
            f"img_shapes {first} has tokens of several images (editing, layers), which an ensemble does not support; leave them out"
        )
    if any(other != first for other in each):
        raise NotImplementedError(
            "images of different sizes in one batch (img_shapes) are not supported by an ensemble; draw them one size at a time"
        )
    frames, rows, columns = first[0]
    return int(frames), int(rows), int(columns)


class QwenImageCall(Call):
    """Latents packed into tokens; the states of Qwen2.5-VL and which of them are no padding; times from 0 to 1."""

    tokens = 512  # at most; prompts are padded to the longest of their batch
    patch = 2**LEVEL
    encoded = (0, 1)
    named = ("prompt_embeds", "prompt_embeds_mask")
    varying = True
    nothing = " "  # as in the examples of its authors
    guidance = 4.0
    alike = ("in_channels", "out_channels", "joint_attention_dim", "axes_dims_rope", "attention_head_dim")
    joined = False  # experts share the encoder of 7 billion parameters, which fine-tunes leave as it is

    def pipeline(self, text_encoders: int) -> str:
        return "QwenImagePipeline"

    def side(self, config: Any) -> Any:
        return SIDE

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels) // self.patch**2

    def parts(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """States, and a mask even where the pipeline found no padding and left it out."""
        states, mask = encoded
        return states, torch.ones(
            states.shape[:2], dtype=torch.bool, device=states.device
        ) if mask is None else mask.to(torch.bool)

    def prompts(self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]) -> dict[str, Any]:
        found = zip(self.named, self.parts(encode(captions)), strict=True)
        nothing = zip(self.named, self.parts(encode([self.nothing] * len(captions))), strict=True)
        return {**dict(found), **{f"negative_{name}": part for name, part in nothing}}

    def guiding(self, strength: float) -> dict[str, Any]:
        return {"true_cfg_scale": strength}

    def guided(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """Its pipelines guide only where there is something to guide away from."""
        found = super().guided(config, count, strength, negative, true)
        told = found.pop("guidance_scale")
        return {
            **found,
            **self.guiding(told),
            **({"negative_prompt": [self.nothing] * count} if negative is None and told > 1 else {}),
        }

    def unpaired(self, config: Any) -> str:
        return "the pipelines of these experts make its two passes one after another"

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": parts[0], "encoder_hidden_states_mask": parts[1]}

    def blank(self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
        return {"encoder_hidden_states": empty(batch, tokens, config.joint_attention_dim)}

    def arguments(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        size = (noisy.shape[-2] // self.patch, noisy.shape[-1] // self.patch)
        mask = conditions.get("encoder_hidden_states_mask")
        return {
            "hidden_states": pack(noisy),
            "timestep": self.told(times.to(noisy.dtype)),
            "img_shapes": [[(1, *size)]] * len(noisy),
            **conditions,
            "encoder_hidden_states_mask": None
            if mask is None or mask.all()
            else mask,  # as the pipeline: without padding, attention is faster
        }

    def counted(self, timestep: Tensor | float | int) -> Tensor | float | int:
        return timestep * TIMES

    def told(self, times: Tensor) -> Tensor:
        return times / TIMES

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        _, rows, columns = shape_of(call["img_shapes"])
        return unpack(call["hidden_states"], (rows * self.patch, columns * self.patch))

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        set_steps(scheduler, steps, size[0] * size[1] // self.patch**2)

    def combined(self, without: Tensor, told: Tensor, strength: float) -> Tensor:
        """Guidance that leaves every token as long as it is with the prompt, as the pipelines do it."""
        combined, as_told = (pack(part) for part in (super().combined(without, told, strength), told))
        size = (told.shape[-2], told.shape[-1])
        return unpack(
            combined * (as_told.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)), size
        )

    def prediction(self, answer: Tensor, size: tuple[int, int]) -> Tensor:
        return unpack(answer, size)

    def answer(self, prediction: Tensor) -> Tensor:
        return pack(prediction)


class QwenImageEnsemble(EnsembleDenoiser):
    """N `QwenImageTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "qwen-image"
    call = QwenImageCall()
    read_stages = staticmethod(stages)
    # 60 blocks 3072 wide: aggregators of three experts have 247 million parameters at all stages and 64 at every
    # fourth, as those of FLUX.1 and SD3 have
    default_placement = "every-4"

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
                raise NotImplementedError(
                    f"{name} is not supported by an ensemble of Qwen-Image experts; leave it out"
                )
        options, lora_scale = attention_options(attention_kwargs)
        shape = qwen_image.shape_of(img_shapes)
        self._check_text(encoder_hidden_states, encoder_hidden_states_mask)

        def begin(expert: int) -> tuple[Tensor, TokenTrace]:
            own = self.given(expert, hidden_states, timestep)
            return qwen_image.begin(
                self.experts[expert], *own, encoder_hidden_states, shape, encoder_hidden_states_mask, options
            )

        residuals = self._residuals(controlnet_block_samples, shape[1:])
        with lora_scaled(self.experts, lora_scale):
            prediction = as_tokens(
                self._run(begin, timestep, residuals, noisy=lambda: as_map(hidden_states, shape[1:]))
            )
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _check_text(self, states: Tensor, mask: Tensor | None) -> None:
        """Raises ValueError for states that no expert takes, or a mask of others."""
        width = self.config.joint_attention_dim
        if states.shape[-1] != width:
            raise ValueError(
                f"encoder_hidden_states is {states.shape[-1]} wide; expected {width}, the same for all experts"
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"encoder_hidden_states_mask is {tuple(mask.shape)}; expected {tuple(states.shape[:2])}, as the states are"
            )

    def _residuals(self, controls: Sequence[Tensor] | None, grid: tuple[int, int]) -> Residuals:
        """ControlNet residuals (B, S, C), each for several blocks in a row."""
        residuals = Residuals()
        if controls:
            blocks = self.stages[:-1]
            interval = ceil(len(blocks) / len(controls))
            for index, stage in enumerate(blocks):
                residuals.to_hidden[stage.name] = as_map(controls[index // interval], grid)
        return residuals
