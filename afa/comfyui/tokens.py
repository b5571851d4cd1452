"""What ComfyUI's transformers share: lists of blocks, the output head, residuals of ControlNets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from afa.errors import UserError
from afa.stages.stage import Stage
from afa.stages.tokens import LEVEL, Block, Head, TokenContext, as_map


@dataclass(kw_only=True, eq=False)
class TokenHead(Head):
    """The output norm and projection."""

    def project(self, image: Tensor, context: TokenContext) -> Tensor:
        patches: Tensor = self.model.final_layer(image, context.temb)
        return patches

    def modules(self) -> list[object]:
        return [self.model.final_layer]


def blocks_of(
    kind: type[Block], letter: str, group: str, modules: Any, width: int, **more: Any
) -> list[Block]:
    """Read a list of blocks as stages.

    kind:    of the stages
    letter:  with which their names begin
    group:   of the stages
    modules: the blocks
    width:   channels of an image token
    more:    fields of the stages
    """
    facts: dict[str, Any] = {"channels": width, "level": LEVEL, "group": group, **more}
    return [
        kind(name=f"{letter}{index:02}", module=module, index=index, **facts)
        for index, module in enumerate(modules)
    ]


def grid_of(x: Tensor) -> tuple[int, int]:
    """Return the rows and columns of image tokens; sides that are no multiple of the patch are padded."""
    rows, columns = (-(-side // 2**LEVEL) for side in x.shape[-2:])
    return rows, columns


def residuals_of(
    stages: Sequence[Stage], given: Sequence[Tensor | None], grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Assign a ControlNet's list to stages, one for each in turn.

    given: (B, S, C) tokens; None for a stage that gets none
    grid:  rows and columns of the tokens
    Raises UserError for another number of tokens.
    """
    found = {}
    for stage, own in zip(stages, given, strict=False):
        if own is None:
            continue
        if own.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"the ControlNet gives {own.shape[1]} tokens, the experts have {grid[0]} x {grid[1]}; "
                "take one of their architecture"
            )
        found[stage.name] = as_map(own, grid)
    return found
