"""Shared by the transformer families: image tokens as feature maps, stages for blocks and output head."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afa.stages.stage import Stage, StageContext

LEVEL = 1  # tokens stand for 2×2 latent pixels in most families


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Arrange image tokens, which come row by row, as a map: (B, H·W, C) -> (B, C, H, W), a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def as_tokens(features: Tensor) -> Tensor:
    """Arrange a map as image tokens: (B, C, H, W) -> (B, H·W, C), contiguous like a block's own output."""
    return features.flatten(2).transpose(1, 2).contiguous()


def pack(latents: Tensor, side: int = 2) -> Tensor:
    """Pack latents as the stock pipelines do: (B, C, H, W) -> (B, H/side·W/side, C·side²).

    side: of the square of pixels that is one token
    The features of a token are ordered by channel, row, column.
    """
    batch, channels, height, width = latents.shape
    rows, columns = height // side, width // side
    parts = latents.view(batch, channels, rows, side, columns, side)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * side**2)


def unpack(tokens: Tensor, size: tuple[int, int], side: int = 2) -> Tensor:
    """Undo `pack`. size: height and width of the latents."""
    height, width = size
    parts = tokens.unflatten(1, (height // side, width // side)).unflatten(-1, (-1, side, side))
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def set_steps(scheduler: Any, steps: int, tokens: int) -> None:
    """Set the steps of a flow-matching scheduler as the stock pipelines of packed latents do.

    The sigmas are evenly spaced from noise to image, then shifted by the number of image tokens.
    scheduler: a flow-matching scheduler of diffusers
    steps:     number of sampling steps
    tokens:    number of image tokens
    Source: Esser et al., arXiv:2403.03206, section 5.3.2; the straight line between two sizes as in FLUX.1.
    """
    # defaults of the stock pipelines
    known = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    few, many, low, high = (scheduler.config.get(name, value) for name, value in known.items())
    slope = (high - low) / (many - few)
    scheduler.set_timesteps(
        sigmas=[1 - step / steps for step in range(steps)], mu=tokens * slope + (low - slope * few)
    )


@dataclass(kw_only=True)
class TokenContext(StageContext):
    """The context of a transformer.

    grid:       rows and columns of image tokens
    conditions: keyword arguments of every block
    """

    grid: tuple[int, int]
    conditions: dict[str, Any]


@dataclass(kw_only=True, eq=False)
class Block(Stage):
    """One transformer block of image and text tokens.

    module: the block
    unused: names of sub-modules without influence on the prediction: in a last block, those for text tokens
    """

    module: nn.Module
    unused: tuple[str, ...] = ()

    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        assert isinstance(context, TokenContext)
        text, image = self.process(as_tokens(hidden), context)
        return as_map(image, context.grid), dataclasses.replace(context, text_tokens=text)

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        """Run the block on image tokens (B, S, C).

        Returns text tokens (None if no later block reads them) and image tokens. A block that takes both as
        one sequence, or other arguments, is a subclass with its own `process`.
        """
        text, image = self.module(
            hidden_states=image, encoder_hidden_states=context.text_tokens, **self.arguments(context)
        )
        return text, image

    def arguments(self, context: TokenContext) -> dict[str, Any]:
        """Return the keyword arguments of the block besides the tokens."""
        return context.conditions

    def modules(self) -> list[object]:
        return [self.module]

    def unused_modules(self) -> list[object]:
        return [self.module.get_submodule(name) for name in self.unused]


@dataclass(kw_only=True, eq=False)
class SequenceBlock(Block):
    """One transformer block that takes text and image tokens as one sequence, text first."""

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        sequence = self.module(sequence_of(context.text_tokens, image), **self.arguments(context))
        length = sequence.shape[1] - image.shape[1]
        return (sequence[:, :length] if length else None), sequence[:, length:]


def sequence_of(text: Tensor | None, image: Tensor) -> Tensor:
    """Join text tokens, if there are any, and image tokens: (B, T, C) and (B, S, C) -> (B, T + S, C)."""
    return image if text is None else torch.cat([text, image], dim=1)


@dataclass(kw_only=True, eq=False)
class Head(Stage):
    """The output norm and projection: each image token becomes one patch of the prediction, not yet unfolded.

    model: the owner of both layers, which are looked up at each run since a LoRA may wrap them later
    """

    model: Any

    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        assert isinstance(context, TokenContext)
        return as_map(self.project(as_tokens(hidden), context), context.grid), context

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        """Project image tokens (B, S, C) to patches of the prediction."""
        patches: Tensor = self.model.proj_out(self.model.norm_out(image, context.temb))
        return patches

    def modules(self) -> list[object]:
        return [self.model.norm_out, self.model.proj_out]
