"""The Qwen-Image family: stages, call, drop-in denoiser.

`QwenImageTransformer2DModel` is read as stages Q00 … Q59 and OUT. Every block has separate weights for image
and text tokens, which attend to each other; padding in the text is masked. Every expert keeps its own text
tokens. Only the model's own sub-modules run.

Source of the architecture: Wu et al., Qwen-Image, arXiv:2508.02324.
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

TIMES = 1000  # timesteps of a schedule; the models take a fraction of them, 0 to 1
SIDE = 128  # of latents of 1024 px, the default of its pipeline; the config does not record it
# config switches -> the variants that have them; guidance_embeds: the stock forward fails on such a model
VARIANTS = {
    "zero_cond_t": "for editing",
    "use_additional_t_cond": "for layers",
    "use_layer3d_rope": "for layers",
    "guidance_embeds": "distilled",
}
SILENT = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp")  # in the last block, whose text output is unused
Shape = tuple[int, int, int]


def stages(model: Any) -> tuple[Stage, ...]:
    """Read a `QwenImageTransformer2DModel` as stages: 60 blocks and the head.

    Raises ValueError, naming the switch, for unsupported variants, and for a patch size other than 2.
    """
    config = model.config
    for switch, variant in VARIANTS.items():
        if config.get(switch):
            raise ValueError(
                f"{switch} (a variant {variant}) is not supported; "
                "only Qwen-Image itself is, which draws images from text"
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
    """Return the widths of the time embedding (E) and of the text states (D)."""
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
    """Start the pass of one expert.

    tokens:   (B, S, C) packed noisy latents
    timestep: (B,) from 0 to 1
    text:     (B, T, D) states of Qwen2.5-VL
    shape:    of the image in tokens: (1, rows, columns)
    mask:     (B, T), 1 for text, 0 for padding; None: no padding
    options:  of the attention processors
    Returns the image tokens as a map, and the trace.
    """
    hidden = model.img_in(tokens)
    temb = model.time_text_embed(timestep.to(hidden.dtype), hidden)
    states = model.txt_in(model.txt_norm(text))
    text_mask = None if mask is None else mask.to(torch.bool)
    rotary = model.pos_embed([shape], max_txt_seq_len=text.shape[1], device=hidden.device)
    conditions = {
        "encoder_hidden_states_mask": text_mask,
        "temb": temb,
        "image_rotary_emb": rotary,
        "joint_attention_kwargs": options,
    }
    grid = shape[1:]
    return as_map(hidden, grid), TokenTrace(
        temb=temb, text=states, text_mask=text_mask, stream=states, grid=grid, conditions=conditions
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


class QwenImageCall(Call):
    """How Qwen-Image is called: packed latents, states of Qwen2.5-VL and a mask, timesteps from 0 to 1."""

    tokens = 512  # at most; prompts are padded to the longest of the batch
    patch = 2**LEVEL
    encoded = (0, 1)
    named = ("prompt_embeds", "prompt_embeds_mask")
    varying = True
    nothing = " "  # as in the examples of its authors
    guidance = 4.0
    alike = ("in_channels", "out_channels", "joint_attention_dim", "axes_dims_rope", "attention_head_dim")
    joined = False  # experts share the encoder of 7 billion parameters, which fine-tunes do not change

    def pipeline(self, text_encoders: int) -> str:
        return "QwenImagePipeline"

    def side(self, config: Any) -> Any:
        return SIDE

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels) // self.patch**2

    def parts(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return states and a mask; the pipeline's mask is None if there is no padding."""
        states, mask = encoded
        everything = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return states, everything if mask is None else mask.to(torch.bool)

    def prompts(self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]) -> dict[str, Any]:
        found = zip(self.named, self.parts(encode(captions)), strict=True)
        nothing = zip(self.named, self.parts(encode([self.nothing] * len(captions))), strict=True)
        return {**dict(found), **{f"negative_{name}": part for name, part in nothing}}

    def guiding(self, strength: float) -> dict[str, Any]:
        return {"true_cfg_scale": strength}

    def guided(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """Return the pipeline's arguments for guidance; see Call.guided.

        The pipelines apply guidance only if they get a negative prompt.
        """
        found = super().guided(config, count, strength, negative, true)
        scale = found.pop("guidance_scale")
        empty = {"negative_prompt": [self.nothing] * count} if negative is None and scale > 1 else {}
        return {**found, **self.guiding(scale), **empty}

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
        if mask is not None and mask.all():
            mask = None  # as in the pipeline: attention without padding is faster
        return {
            "hidden_states": pack(noisy),
            "timestep": self.timestep_to_model(times.to(noisy.dtype)),
            "img_shapes": [[(1, *size)]] * len(noisy),
            **conditions,
            "encoder_hidden_states_mask": mask,
        }

    def timestep_from_model(self, timestep: Tensor | float | int) -> Tensor | float | int:
        return timestep * TIMES

    def timestep_to_model(self, times: Tensor) -> Tensor:
        return times / TIMES

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        _, rows, columns = shape_of(call["img_shapes"])
        return unpack(call["hidden_states"], (rows * self.patch, columns * self.patch))

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        set_steps(scheduler, steps, size[0] * size[1] // self.patch**2)

    def combined(self, uncond: Tensor, cond: Tensor, strength: float) -> Tensor:
        """Apply guidance as the pipelines do: every token keeps the norm of the conditional prediction."""
        guided, target = pack(super().combined(uncond, cond, strength)), pack(cond)
        scale = target.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * scale, (cond.shape[-2], cond.shape[-1]))

    def prediction(self, answer: Tensor, size: tuple[int, int]) -> Tensor:
        return unpack(answer, size)

    def answer(self, prediction: Tensor) -> Tensor:
        return pack(prediction)


class QwenImageEnsemble(EnsembleDenoiser):
    """N `QwenImageTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "qwen-image"
    call = QwenImageCall()
    read_stages = staticmethod(stages)
    # 60 blocks, 3072 channels: aggregators of three experts have 247 million parameters at all stages, and
    # 64 million at every fourth, similar to FLUX.1 and SD3
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
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states:      (B, T, D) for all experts
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
        options, lora_scale = attention_options(attention_kwargs)
        shape = qwen_image.shape_of(img_shapes)
        self._check_text(encoder_hidden_states, encoder_hidden_states_mask)

        def begin(expert: int) -> tuple[Tensor, TokenTrace]:
            own = self.inputs_for_expert(expert, hidden_states, timestep)
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
        """Raise ValueError for states of a wrong width, or a mask of another shape than the states."""
        width = self.config.joint_attention_dim
        if states.shape[-1] != width:
            raise ValueError(
                f"encoder_hidden_states is {states.shape[-1]} wide; "
                f"expected {width}, the same for all experts"
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"encoder_hidden_states_mask is {tuple(mask.shape)}; "
                f"expected {tuple(states.shape[:2])}, as the states are"
            )

    def _residuals(self, controls: Sequence[Tensor] | None, grid: tuple[int, int]) -> Residuals:
        """Assign ControlNet residuals (B, S, C) to blocks: each serves several blocks in a row."""
        residuals = Residuals()
        if controls:
            blocks = self.stages[:-1]
            interval = ceil(len(blocks) / len(controls))
            for index, stage in enumerate(blocks):
                residuals.to_hidden[stage.name] = as_map(controls[index // interval], grid)
        return residuals
