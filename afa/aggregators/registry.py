"""The table of aggregators, and how an ensemble's stages get theirs."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from afa.aggregators.base import Aggregator, Fixed, Mean
from afa.aggregators.sabw import SABW
from afa.aggregators.stitch import Stitch
from afa.errors import UserError, look_up
from afa.schema import build, hints_of, shown
from afa.stages.stage import Stage

AGGREGATORS: dict[str, type[Aggregator]] = {
    "sabw": SABW,
    "stitch": Stitch,
    "mean": Mean,
    "fixed": Fixed,
}


TEXT_STREAMS = ("own", "fused")
GIVEN = {"experts", "channels", "time_width", "text_width"}  # what the experts decide


@dataclass(frozen=True)
class Recipe:
    """How the aggregators of an ensemble are made: kind, options of that kind, and where attention is spared.

    attention_up_to: for sabw, the largest side (in latent pixels, at the model's own sample_size) of a map on which
    the transformer is built; larger maps get depth 0. None: everywhere, as in the paper. With 32, SD 1.5 spends no
    attention on its seven 64×64 stages, which cost most.
    text_stream: in families whose blocks change text tokens, own: every expert keeps its own; fused: where image tokens are
    fused, text tokens are, too, by what each expert weighs in the whole image. Raises ValueError for another.
    """

    kind: str = "sabw"
    options: Mapping[str, Any] = field(default_factory=dict)
    attention_up_to: int | None = None
    text_stream: str = "own"

    def __post_init__(self) -> None:
        look_up(self.text_stream, dict.fromkeys(TEXT_STREAMS), "text_stream")

    def make(
        self, stage: Stage, side: int, experts: int, time_width: int, text_width: int, last: bool = False
    ) -> Aggregator:
        """The aggregator of one stage; side: of the latent, at the model's own sample_size; last: where predictions become one."""
        maker = look_up(self.kind, AGGREGATORS, "aggregator")
        if last and maker is Stitch:
            maker = SABW
        options = dict(self.options)
        if self.attention_up_to is not None and -(-side // 2**stage.level) > self.attention_up_to:
            options["depth"] = 0
        for name in options:
            if name not in _options(maker):
                raise ValueError(f"aggregator '{self.kind}' has no option '{name}'")
        return maker(
            experts=experts, channels=stage.channels, time_width=time_width, text_width=text_width, **options
        )


def _options(maker: type[Aggregator]) -> set[str]:
    """The names a kind of aggregator can be made with; stitch takes those of SABW."""
    return set(inspect.signature(SABW if maker is Stitch else maker).parameters)


def check_options(kind: str, options: Mapping[str, Any], where: str) -> None:
    """Raises UserError for options that were read from a file and are not known, of another kind, or out of bounds."""
    maker = AGGREGATORS[kind]
    hints = hints_of(SABW.__init__ if maker is Stitch else maker.__init__)
    known = sorted(_options(maker) - GIVEN)
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"{where}: aggregator '{kind}' has no option {shown(name)}; it has {', '.join(known) or 'none'}"
            )
        build(hints[name], value, where, f"aggregator.options.{name}")


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module holds."""
    return sum(parameter.numel() for parameter in module.parameters())
