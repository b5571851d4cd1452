"""The FLUX.1 family: `FluxTransformer2DModel` as stages D00 … D18 (double blocks), S00 … S37 (single blocks) and OUT.

Double blocks have weights of their own for image and text tokens, single blocks take both as one sequence. Every expert
keeps its own text tokens. Only the model's own sub-modules run. Source of the architecture: Black Forest Labs, FLUX.1
(github.com/black-forest-labs/flux).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.families.call import Call
from afa.families.stage import Stage
from afa.families.tokens import LEVEL, Block, Head, TokenTrace, as_map, pack, set_steps, unpack

GUIDANCE = 3.5  # told to guidance-distilled models in training, as their pipelines do by default
TIMES = 1000  # of a schedule: its models are told a share of them
SIDE = 128  # of the latents of 1024 px, what these models are made for; their config says nothing


def stages(model: Any) -> tuple[Stage, ...]:
    """Read a `FluxTransformer2DModel` as its stages: 57 blocks for FLUX.1, and the head. Raises ValueError for another patch size."""
    if model.config.patch_size != 1:
        raise ValueError(f"patch_size {model.config.patch_size} is not supported; FLUX packs its latents itself and has 1")
    blocks = [
        Block(name=f"{letter}{index:02}", channels=model.inner_dim, level=LEVEL, block=f"{place}.{index}", group=group, module=block)
        for letter, group, place in (("D", "double", "transformer_blocks"), ("S", "single", "single_transformer_blocks"))
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
    return as_map(hidden, grid), TokenTrace(temb=temb, text=states, stream=states, grid=grid, conditions=conditions)


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
        raise NotImplementedError("tokens of reference images (Kontext, editing) are not supported by an ensemble; leave the image out")
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
    alike = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope", "attention_head_dim")
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

    def arguments(self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
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

    def guided(self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None) -> dict[str, Any]:
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
        return guided if true is None else {**guided, "true_cfg_scale": true, "negative_prompt": [negative or ""] * count}

    def classifier_free(self, config: Any) -> float:
        return 1.0

    def unpaired(self, config: Any) -> str:
        return "these experts have theirs built in (guidance_embeds)" if config.guidance_embeds else "these experts were distilled to do without"
