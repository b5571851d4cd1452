"""What transformer families share: image tokens shown as maps, and blocks that change image and text tokens together."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from afa.stages.stage import Stage, Trace

LEVEL = 1  # tokens stand for 2×2 latent pixels in every family known here


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Image tokens, row by row, as the map they are: (B, H·W, C) -> (B, C, H, W), a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def as_tokens(features: Tensor) -> Tensor:
    """A map as image tokens: (B, C, H, W) -> (B, H·W, C), contiguous as transformer blocks make them."""
    return features.flatten(2).transpose(1, 2).contiguous()


def pack(latents: Tensor) -> Tensor:
    """Latents as the tokens that pipelines make of them, one for 2×2 pixels: (B, C, H, W) -> (B, H/2·W/2, C·4), ordered C, row, column."""
    batch, channels, height, width = latents.shape
    parts = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of pack. size: height and width of the latents."""
    height, width = size
    parts = tokens.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def set_steps(scheduler: Any, steps: int, tokens: int) -> None:
    """A flow's steps as pipelines of packed latents set them: even from noise to image, shifted by how many image tokens there are.

    Source: Esser et al., arXiv:2403.03206, section 5.3.2; the straight line between two sizes as in FLUX.1.
    """
    known = {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }  # the pipelines' defaults
    few, many, low, high = (scheduler.config.get(name, value) for name, value in known.items())
    slope = (high - low) / (many - few)
    scheduler.set_timesteps(
        sigmas=[1 - step / steps for step in range(steps)], mu=tokens * slope + (low - slope * few)
    )


@dataclass(kw_only=True)
class TokenTrace(Trace):
    """A transformer's trace. grid: rows and columns of image tokens. conditions: keyword arguments of every block."""

    grid: tuple[int, int]
    conditions: dict[str, Any]


@dataclass(kw_only=True, eq=False)
class Block(Stage):
    """One transformer block of image and text tokens. It returns (text, image), the text None where nothing reads it any more.

    silent: names of its sub-modules that have no say in the prediction: in a last block, what makes text tokens.
    """

    module: nn.Module
    silent: tuple[str, ...] = ()

    def run(
        self, hidden: Tensor, trace: Trace, skip: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Trace]:
        assert isinstance(trace, TokenTrace)
        stream, tokens = self.module(
            hidden_states=as_tokens(hidden), encoder_hidden_states=trace.stream, **self.arguments(trace)
        )
        return as_map(tokens, trace.grid), dataclasses.replace(trace, stream=stream)

    def arguments(self, trace: TokenTrace) -> dict[str, Any]:
        """What the block takes besides the tokens."""
        return trace.conditions

    def modules(self) -> list[object]:
        return [self.module]

    def unheard(self) -> list[object]:
        return [self.module.get_submodule(name) for name in self.silent]


@dataclass(kw_only=True, eq=False)
class Head(Stage):
    """The output norm and projection: a patch of the prediction from every image token, not yet unfolded.

    model: whose they are; a LoRA may be put in front of them later.
    """

    model: Any

    def run(
        self, hidden: Tensor, trace: Trace, skip: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Trace]:
        assert isinstance(trace, TokenTrace)
        return as_map(
            self.model.proj_out(self.model.norm_out(as_tokens(hidden), trace.temb)), trace.grid
        ), trace

    def modules(self) -> list[object]:
        return [self.model.norm_out, self.model.proj_out]
