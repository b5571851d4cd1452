"""Shared by the transformer families: image tokens as feature maps, stages for blocks and output head."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

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


def fold(latents: Tensor) -> Tensor:
    """Fold latents to a map of patches: (B, C, 2·H, 2·W) -> (B, 4·C, H, W).

    The features of a patch are ordered by row, column, channel, as by the output heads of models that take
    latents unpacked.
    """
    side = 2**LEVEL
    parts = latents.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, H, p, W, p)
    return torch.einsum("nchpwq->npqchw", parts).flatten(1, 3)


def unfold(patches: Tensor) -> Tensor:
    """Undo `fold`."""
    side = 2**LEVEL
    batch, channels, height, width = patches.shape
    parts = patches.reshape(batch, side, side, channels // side**2, height, width)
    return torch.einsum("npqchw->nchpwq", parts).reshape(
        batch, channels // side**2, side * height, side * width
    )


def set_steps(scheduler: Any, steps: int, tokens: int, *, single: bool = False) -> None:
    """Set the steps of a flow-matching scheduler as the stock pipelines of packed latents do.

    The sigmas are evenly spaced from noise to image, then shifted by the number of image tokens.
    scheduler: a flow-matching scheduler of diffusers
    steps:     number of sampling steps
    tokens:    number of image tokens
    single:    the evenly spaced sigmas are rounded to single precision, as some pipelines do
    Source: Esser et al., arXiv:2403.03206, section 5.3.2; the straight line between two sizes as in FLUX.1.
    """
    # defaults of the stock pipelines
    known = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    few, many, low, high = (scheduler.config.get(name, value) for name, value in known.items())
    slope = (high - low) / (many - few)
    sigmas = torch.linspace(1, 1 / steps, steps).tolist() if single else [1 - k / steps for k in range(steps)]
    scheduler.set_timesteps(sigmas=sigmas, mu=tokens * slope + (low - slope * few))


def has_values(tensor: Tensor) -> bool:
    """Return False for a tensor of a pass that is only counted: on the meta device, in FakeTensorMode."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def grid_of(ids: Tensor) -> tuple[int, int]:
    """Return the number of rows and columns of the image tokens.

    ids: (S, 3 or 4) position ids: kind, row, column. If they have no values, the result is the grid of S
         tokens that is closest to a square
    Raises NotImplementedError for tokens of several images (Kontext, reference images), which form no map.
    """
    ids = flat_ids(ids)
    count = ids.shape[0]
    if not has_values(ids):
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


def mask_of(lengths: Sequence[int], text: Tensor) -> Tensor | None:
    """Return which tokens are text and not padding, (B, T) bool; None if all are.

    lengths: of the captions, in tokens
    text:    (B, T, C)
    """
    longest = text.shape[1]
    if min(lengths) == longest:
        return None
    places = torch.arange(longest, device=text.device)
    return places < torch.tensor(lengths, device=text.device)[:, None]


def flat_ids(ids: Tensor) -> Tensor:
    """Drop the batch dimension of ids, which older pipelines add."""
    return ids[0] if ids.ndim == 3 else ids


@dataclass(kw_only=True)
class TokenContext(StageContext):
    """The context of a transformer.

    grid:       rows and columns of image tokens
    conditions: keyword arguments of every block
    """

    grid: tuple[int, int]
    conditions: dict[str, Any]


@dataclass(kw_only=True)
class RefinedContext(TokenContext):
    """The context of a transformer whose first blocks (RefinerBlock) do not see the caption.

    refining: keyword arguments of these blocks
    padding:  number of tokens that pad the image; `text_tokens` begin with them
    """

    refining: dict[str, Any]
    padding: int = 0


@dataclass(kw_only=True, eq=False)
class Block(Stage):
    """One transformer block of image and text tokens.

    module: the block
    unused: names of sub-modules without influence on the prediction: in a last block, those for text tokens
    feeds:  names of its feed-forward sub-modules that are of a class of their own, see Stage.feed_forward
    index:  of the block in its list
    """

    module: nn.Module
    unused: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    index: int = 0

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

    def feed_forward(self) -> list[object]:
        return [self.module.get_submodule(name) for name in self.feeds]


@dataclass(kw_only=True, eq=False)
class SequenceBlock(Block):
    """One transformer block that takes text and image tokens as one sequence, its first argument.

    text_first: text tokens come before image tokens
    """

    text_first: ClassVar[bool] = True

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        text, count = context.text_tokens, image.shape[1]
        sequence = self.module(sequence_of(text, image, self.text_first), **self.arguments(context))
        if text is None:
            return None, sequence
        if self.text_first:
            return sequence[:, :-count], sequence[:, -count:]
        return sequence[:, count:], sequence[:, :count]


@dataclass(kw_only=True, eq=False)
class RefinerBlock(SequenceBlock):
    """One block of a noise refiner: image tokens and their padding, without the caption."""

    text_first = False

    def process(self, image: Tensor, context: TokenContext) -> tuple[Tensor | None, Tensor]:
        assert isinstance(context, RefinedContext) and context.text_tokens is not None
        padding, caption = context.text_tokens.tensor_split([context.padding], dim=1)
        own = dataclasses.replace(context, text_tokens=padding, conditions=context.refining)
        refined, image = super().process(image, own)
        assert refined is not None
        return torch.cat([refined, caption], dim=1), image


def sequence_of(text: Tensor | None, image: Tensor, text_first: bool = True) -> Tensor:
    """Join text tokens, if there are any, and image tokens: (B, T, C) and (B, S, C) -> (B, T + S, C)."""
    if text is None:
        return image
    return torch.cat([text, image] if text_first else [image, text], dim=1)


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
