"""The FLUX.1 family: stages, call, drop-in denoiser.

`FluxTransformer2DModel` is read as stages D00 … D18 (double blocks), S00 … S37 (single blocks) and OUT.
Double blocks have separate weights for image and text tokens; single blocks process both as one sequence.
Every expert keeps its own text tokens. Only the model's own sub-modules run.

Source of the architecture: Black Forest Labs, FLUX.1 (github.com/black-forest-labs/flux).
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

GUIDANCE = 3.5  # input of guidance-distilled models in training: the default of their pipelines
TIMES = 1000  # timesteps of a schedule; the models take a fraction of them, 0 to 1
SIDE = 128  # of latents of 1024 px, for which these models are made; their config does not record it


def stages(model: Any) -> tuple[Stage, ...]:
    """Read a `FluxTransformer2DModel` as stages: 57 blocks for FLUX.1, and the head.

    Raises ValueError for a patch size other than 1.
    """
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
    """Return the widths of the time embedding (E) and of the text states (D)."""
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
    """Start the pass of one expert.

    tokens:   (B, S, C) packed noisy latents
    timestep: (B,) from 0 to 1
    text:     (B, T, D) states of T5
    pooled:   (B, P) pooled states of CLIP
    ids:      position ids of text tokens (T, 3) and image tokens (S, 3)
    guidance: (B,) for guidance-distilled models
    options:  of the attention processors
    Returns the image tokens as a map, and the trace.
    """
    hidden = model.x_embedder(tokens)
    time = timestep.to(hidden.dtype) * TIMES
    embedded = (time, pooled) if guidance is None else (time, guidance.to(hidden.dtype) * TIMES, pooled)
    temb = model.time_text_embed(*embedded)
    states = model.context_embedder(text)
    rotary = model.pos_embed(torch.cat([_flat(part) for part in ids], dim=0))
    grid = grid_of(ids[1])
    conditions = {"temb": temb, "image_rotary_emb": rotary, "joint_attention_kwargs": options}
    return as_map(hidden, grid), TokenTrace(
        temb=temb, text=states, stream=states, grid=grid, conditions=conditions
    )


def grid_of(ids: Tensor) -> tuple[int, int]:
    """Return the number of rows and columns of the image tokens.

    ids: (S, 3 or 4) position ids: kind, row, column. On the meta device, which has no values, the result is
         the grid of S tokens that is closest to a square
    Raises NotImplementedError for tokens of several images (Kontext, reference images), which form no map.
    """
    ids = _flat(ids)
    count = ids.shape[0]
    if ids.is_meta:
        rows = next(rows for rows in range(int(count**0.5), 0, -1) if count % rows == 0)
        return rows, count // rows
    kind, height, width = (int(value) for value in (ids[:, :3].amax(0) - ids[:, :3].amin(0)).tolist())
    if kind or (height + 1) * (width + 1) != count:
        raise NotImplementedError(
            "tokens of reference images (Kontext, editing) are not supported by an ensemble; "
            "leave the image out"
        )
    return height + 1, width + 1


def image_ids(size: tuple[int, int], like: Tensor) -> Tensor:
    """Make a pipeline's position ids of image tokens, (H/2·W/2, 3): zero, row, column.

    size: height and width of the latents
    like: a tensor with the dtype and device to use
    """
    rows, columns = size[0] // 2, size[1] // 2
    ids = like.new_zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)[None, :]
    return ids.view(rows * columns, 3)


def _flat(ids: Tensor) -> Tensor:
    """Drop the batch dimension of ids, which older pipelines add."""
    return ids[0] if ids.ndim == 3 else ids


class FluxCall(Call):
    """How FLUX.1 is called: packed latents, states of T5, pooled states of CLIP, timesteps from 0 to 1."""

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
            "timestep": self.timestep_to_model(times.to(noisy.dtype)),
            "img_ids": image_ids((noisy.shape[-2], noisy.shape[-1]), noisy),
            "txt_ids": noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            **conditions,
        }
        if config.guidance_embeds:
            call["guidance"] = torch.full((len(noisy),), GUIDANCE, device=noisy.device)
        return call

    def timestep_from_model(self, timestep: Tensor | float | int) -> Tensor | float | int:
        return timestep * TIMES

    def timestep_to_model(self, times: Tensor) -> Tensor:
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
        """Return the pipeline's arguments for guidance; see Call.guided.

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
                f"a negative prompt needs classifier-free guidance, and {self.unpaired(config)};"
                " give that a strength above 1 (--true-guidance), or leave the prompt out"
            )
        if true is not None and true <= 1:
            raise UserError(f"true guidance {true:g} adds nothing; give one above 1, or leave it out")
        built_in = self.strength(config) if strength is None else strength
        guided: dict[str, Any] = {} if built_in is None else {"guidance_scale": built_in}
        if true is None:
            return guided
        return {**guided, "true_cfg_scale": true, "negative_prompt": [negative or ""] * count}

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

    def first_expert_text(
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
        """Predict like the stock forward, with the same arguments.

        encoder_hidden_states: (B, T, D) for all experts, or (B, T, N·D): the states of each expert in order
        pooled_projections:    (B, P) or (B, N·P), in the same way
        Raises NotImplementedError for IP-Adapter, and for tokens of reference images.
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
            own, ids = self.inputs_for_expert(expert, hidden_states, timestep), (txt_ids, img_ids)
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
        """Assign ControlNet residuals to the blocks of one group.

        group:     double or single
        controls:  (B, S, C) residuals, at most one per block
        grid:      rows and columns of image tokens
        residuals: to which they are added
        repeat:    True: use all in turn, again and again; False: use each for several blocks in a row
        """
        if not controls:
            return
        blocks = [stage.name for stage in self.stages if stage.group == group]
        interval = ceil(len(blocks) / len(controls))
        for index, name in enumerate(blocks):
            residuals.to_hidden[name] = as_map(
                controls[index % len(controls) if repeat else index // interval], grid
            )
