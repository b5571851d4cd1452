"""FLUX.1: stages, call, drop-in denoiser.

The FLUX.1 family: `FluxTransformer2DModel` as stages D00 … D18 (double blocks), S00 … S37 (single blocks) and OUT.

Double blocks have weights of their own for image and text tokens, single blocks take both as one sequence. Every expert
keeps its own text tokens. Only the model's own sub-modules run. Source of the architecture: Black Forest Labs, FLUX.1
(github.com/black-forest-labs/flux).
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser, attention_options, first_parts, split_joined
from afa.denoiser.forward import Residuals
from afa.denoiser.lora import lora_scaled
from afa.errors import UserError
from afa.models import flux
from afa.stages.call import Call
from afa.stages.stage import Stage
from afa.stages.tokens import LEVEL, Block, Head, TokenTrace, as_map, as_tokens, pack, set_steps, unpack

GUIDANCE = 3.5  # told to guidance-distilled models in training, as their pipelines do by default
TIMES = 1000  # of a schedule: its models are told a share of them
SIDE = 128  # of the latents of 1024 px, what these models are made for; their config says nothing


def stages(model: Any) -> tuple[Stage, ...]:
    """Read a `FluxTransformer2DModel` as its stages: 57 blocks for FLUX.1, and the head. Raises ValueError for another patch size."""
    if model.config.patch_size != 1:
        raise ValueError(
            f"patch_size {model.config.patch_size} is not supported; FLUX packs its latents itself and has 1"
        )
    blocks = [
        Block(
            name=f"{letter}{index:02}",
            channels=model.inner_dim,
            level=LEVEL,
            block=f"{place}.{index}",
            group=group,
            module=block,
        )
        for letter, group, place in (
            ("D", "double", "transformer_blocks"),
            ("S", "single", "single_transformer_blocks"),
        )
        for index, block in enumerate(getattr(model, place))
    ]
    return (*blocks, Head(name="OUT", channels=model.proj_out.out_features, level=LEVEL, model=model))


def widths(model: Any) -> tuple[int, int]:
    """Widths of the time embedding (E) and of the text states (D)."""
    return model.inner_dim, model.context_embedder.out_features


def begin(
    model: Any,
    tokens: Tensor,
    timestep: Tensor,
    text: Tensor,
    pooled: Tensor,
    ids: tuple[Tensor, Tensor],
    guidance: Tensor | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, TokenTrace]:
    """Start a pass: packed noisy latents (B, S, C), text (B, T, D), pooled (B, P), ids of text (T, 3) and image (S, 3).

    timestep (B,) from 0 to 1; guidance (B,) for distilled models. -> image tokens as a map, the trace.
    """
    hidden = model.x_embedder(tokens)
    time = timestep.to(hidden.dtype) * TIMES
    told = (time, pooled) if guidance is None else (time, guidance.to(hidden.dtype) * TIMES, pooled)
    temb = model.time_text_embed(*told)
    states = model.context_embedder(text)
    rotary = model.pos_embed(torch.cat([_flat(part) for part in ids], dim=0))
    grid = grid_of(ids[1])
    conditions = {"temb": temb, "image_rotary_emb": rotary, "joint_attention_kwargs": options}
    return as_map(hidden, grid), TokenTrace(
        temb=temb, text=states, stream=states, grid=grid, conditions=conditions
    )


def grid_of(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of the image tokens with these ids (S, 3 or 4): what they are counted by is in the two columns after the first.

    On the meta device, where there are no numbers, the most nearly square grid of as many. Raises NotImplementedError for
    tokens of several images (Kontext, reference images), which are no map.
    """
    ids = _flat(ids)
    count = ids.shape[0]
    if ids.is_meta:
        rows = next(rows for rows in range(int(count**0.5), 0, -1) if count % rows == 0)
        return rows, count // rows
    kind, height, width = (int(value) for value in (ids[:, :3].amax(0) - ids[:, :3].amin(0)).tolist())
    if kind or (height + 1) * (width + 1) != count:
        raise NotImplementedError(
            "tokens of reference images (Kontext, editing) are not supported by an ensemble; leave the image out"
        )
    return height + 1, width + 1


def image_ids(size: tuple[int, int], like: Tensor) -> Tensor:
    """The ids a pipeline gives image tokens: (H/2·W/2, 3): zero, row, column. size: of the latents."""
    rows, columns = size[0] // 2, size[1] // 2
    ids = like.new_zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)[None, :]
    return ids.view(rows * columns, 3)


def _flat(ids: Tensor) -> Tensor:
    """Older pipelines hand ids over with a batch dimension."""
    return ids[0] if ids.ndim == 3 else ids


class FluxCall(Call):
    """Latents packed into tokens; the states of T5, pooled states of CLIP; times from 0 to 1."""

    tokens = 512  # of T5
    patch = 2**LEVEL
    encoded = (0, 1)
    named = ("prompt_embeds", "pooled_prompt_embeds")
    joined = True
    alike = (
        "in_channels",
        "out_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
        "axes_dims_rope",
        "attention_head_dim",
    )
    guidance = GUIDANCE
    read = (1,)

    def pipeline(self, text_encoders: int) -> str:
        return "FluxPipeline"

    def side(self, config: Any) -> Any:
        return SIDE

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels) // self.patch**2

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": parts[0], "pooled_projections": parts[1]}

    def blank(self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
        parts = [empty(batch, tokens, config.joint_attention_dim), empty(batch, config.pooled_projection_dim)]
        return self.conditions(config, parts, empty())

    def arguments(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        call = {
            "hidden_states": pack(noisy),
            "timestep": self.told(times.to(noisy.dtype)),
            "img_ids": image_ids((noisy.shape[-2], noisy.shape[-1]), noisy),
            "txt_ids": noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            **conditions,
        }
        if config.guidance_embeds:
            call["guidance"] = torch.full((len(noisy),), GUIDANCE, device=noisy.device)
        return call

    def counted(self, timestep: Tensor | float | int) -> Tensor | float | int:
        return timestep * TIMES

    def told(self, times: Tensor) -> Tensor:
        return times / TIMES

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        rows, columns = grid_of(call["img_ids"])
        return unpack(call["hidden_states"], (rows * self.patch, columns * self.patch))

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        set_steps(scheduler, steps, size[0] * size[1] // self.patch**2)

    def prediction(self, answer: Tensor, size: tuple[int, int]) -> Tensor:
        return unpack(answer, size)

    def answer(self, prediction: Tensor) -> Tensor:
        return pack(prediction)

    def strength(self, config: Any) -> float | None:
        return self.guidance if config.guidance_embeds else None

    def guided(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """strength is told to the model; true guidance is made of two passes a step, against the negative or the empty prompt."""
        if strength is not None and not config.guidance_embeds:
            raise UserError(
                f"guidance {strength:g} changes nothing in models that were distilled without one (FLUX.1-schnell); leave it out,"
                " or give classifier-free guidance a strength of its own (--true-guidance)"
            )
        if true is None and negative is not None:
            raise UserError(
                f"a negative prompt needs classifier-free guidance, and {self.unpaired(config)};"
                " give that a strength above 1 (--true-guidance), or leave the prompt out"
            )
        if true is not None and true <= 1:
            raise UserError(f"true guidance {true:g} adds nothing; give one above 1, or leave it out")
        told = self.strength(config) if strength is None else strength
        guided: dict[str, Any] = {} if told is None else {"guidance_scale": told}
        return (
            guided
            if true is None
            else {**guided, "true_cfg_scale": true, "negative_prompt": [negative or ""] * count}
        )

    def classifier_free(self, config: Any) -> float:
        return 1.0

    def unpaired(self, config: Any) -> str:
        return (
            "these experts have theirs built in (guidance_embeds)"
            if config.guidance_embeds
            else "these experts were distilled to do without"
        )


class FluxEnsemble(EnsembleDenoiser):
    """N `FluxTransformer2DModel` experts as one. See EnsembleDenoiser for the arguments."""

    family = "flux"
    call = FluxCall()
    read_stages = staticmethod(stages)
    default_placement = "every-4"
    encoder_hid_proj = None  # FLUX pipelines ask whether there is an IP-Adapter

    @property
    def widths(self) -> tuple[int, int]:
        return flux.widths(self.experts[0])

    def narrow(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        widths = {
            "encoder_hidden_states": self.config.joint_attention_dim,
            "pooled_projections": self.config.pooled_projection_dim,
        }
        return args, first_parts(kwargs, widths, len(self.experts))

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
        """The stock forward. encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D), each its own part.

        The same holds for pooled_projections. Raises NotImplementedError for IP-Adapter, and for tokens of reference images.
        """
        options, lora_scale = attention_options(joint_attention_kwargs)
        count, config = len(self.experts), self.config
        texts = split_joined(
            encoder_hidden_states, (config.joint_attention_dim,), count, "encoder_hidden_states"
        )
        pooled = split_joined(
            pooled_projections, (config.pooled_projection_dim,), count, "pooled_projections"
        )

        def begin(expert: int) -> tuple[Tensor, TokenTrace]:
            own, ids = self.given(expert, hidden_states, timestep), (txt_ids, img_ids)
            return flux.begin(
                self.experts[expert], *own, texts[expert], pooled[expert], ids, guidance, options
            )

        residuals = Residuals()
        if controlnet_block_samples or controlnet_single_block_samples:
            grid = flux.grid_of(img_ids)
            self._add("double", controlnet_block_samples, grid, residuals, controlnet_blocks_repeat)
            self._add("single", controlnet_single_block_samples, grid, residuals)
        with lora_scaled(self.experts, lora_scale):
            prediction = as_tokens(
                self._run(
                    begin, timestep, residuals, noisy=lambda: as_map(hidden_states, flux.grid_of(img_ids))
                )
            )
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _add(
        self,
        group: str,
        controls: Sequence[Tensor] | None,
        grid: tuple[int, int],
        residuals: Residuals,
        repeat: bool = False,
    ) -> None:
        """ControlNet residuals (B, S, C) of a group of blocks: each for several blocks in a row, or all of them again and again."""
        if not controls:
            return
        blocks = [stage.name for stage in self.stages if stage.group == group]
        interval = ceil(len(blocks) / len(controls))
        for index, name in enumerate(blocks):
            residuals.to_hidden[name] = as_map(
                controls[index % len(controls) if repeat else index // interval], grid
            )
