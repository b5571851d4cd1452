"""What transformer families share: image tokens shown as maps, and blocks that change image and text tokens together."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from afa.families.stage import Stage, Trace

LEVEL = 1  # tokens stand for 2×2 latent pixels in every family known here


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Image tokens, row by row, as the map they are: (B, H·W, C) -> (B, C, H, W), a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def as_tokens(features: Tensor) -> Tensor:
    """A map as image tokens: (B, C, H, W) -> (B, H·W, C), contiguous as transformer blocks make them."""
    return features.flatten(2).transpose(1, 2).contiguous()


@dataclass(kw_only=True)
class TokenTrace(Trace):
    """A transformer's trace. grid: rows and columns of image tokens. conditions: keyword arguments of every block."""

    grid: tuple[int, int]
    conditions: dict[str, Any]


@dataclass(kw_only=True, eq=False)
class Block(Stage):
    """One transformer block of image and text tokens. It returns (text, image), the text None where nothing reads it any more."""

    module: nn.Module

    def run(self, hidden: Tensor, trace: Trace, skip: Tensor | None = None, size: tuple[int, int] | None = None) -> tuple[Tensor, Trace]:
        assert isinstance(trace, TokenTrace)
        stream, tokens = self.module(hidden_states=as_tokens(hidden), encoder_hidden_states=trace.stream, **self.arguments(trace))
        return as_map(tokens, trace.grid), dataclasses.replace(trace, stream=stream)

    def arguments(self, trace: TokenTrace) -> dict[str, Any]:
        """What the block takes besides the tokens."""
        return trace.conditions

    def modules(self) -> list[object]:
        return [self.module]


@dataclass(kw_only=True, eq=False)
class Head(Stage):
    """The output norm and projection: a patch of the prediction from every image token, not yet unfolded.

    model: whose they are; a LoRA may be put in front of them later.
    """

    model: Any

    def run(self, hidden: Tensor, trace: Trace, skip: Tensor | None = None, size: tuple[int, int] | None = None) -> tuple[Tensor, Trace]:
        assert isinstance(trace, TokenTrace)
        return as_map(self.model.proj_out(self.model.norm_out(as_tokens(hidden), trace.temb)), trace.grid), trace

    def modules(self) -> list[object]:
        return [self.model.norm_out, self.model.proj_out]
