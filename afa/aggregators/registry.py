"""The registry of aggregators, and how an ensemble's stages get theirs.

No heavy imports: help comes from here.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from afa.errors import UserError, look_up
from afa.lazy import load
from afa.schema import build, hints_of, shown

if TYPE_CHECKING:
    from torch import nn

    from afa.aggregators.base import Aggregator
    from afa.stages.stage import Stage

GIVEN = ("self", "experts", "channels", "time_width", "text_width")  # what the experts decide


@dataclass(frozen=True)
class AggregatorType:
    """One kind of aggregator.

    make:    "module:Class" of the Aggregator; imported when it is asked for
    help:    what it is, for `--aggregator`
    trained: whether it has weights to train, so that `afa train` offers it
    """

    make: str
    help: str
    trained: bool = True

    def options(self) -> dict[str, inspect.Parameter]:
        """Return its own options by name, with their types (Annotated with their bounds) and defaults.

        A class that takes **options has those of the class it extends.
        """
        found: dict[str, inspect.Parameter] = {}
        for owner in load(self.make).__mro__:
            if "__init__" not in vars(owner):
                continue
            hints = hints_of(owner.__init__)
            parameters = inspect.signature(owner.__init__).parameters.values()
            named = [one for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
            own = {one.name: one.replace(annotation=hints.get(one.name, Any)) for one in named}
            found = {name: own[name] for name in own if name not in GIVEN} | found
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break
        return found


AGGREGATORS: dict[str, AggregatorType] = {
    "sabw": AggregatorType("afa.aggregators.sabw:SABW", "the paper's"),
    "stitch": AggregatorType("afa.aggregators.stitch:Stitch", "every expert keeps a path of its own"),
    "mean": AggregatorType("afa.aggregators.base:Mean", "every expert weighs the same", trained=False),
    "fixed": AggregatorType("afa.aggregators.base:Fixed", "the weights that are given", trained=False),
}


def trained_kinds() -> list[str]:
    """The names of the aggregators that can be trained."""
    return [name for name, entry in AGGREGATORS.items() if entry.trained]


def explain_trained() -> str:
    """What can be trained, for a help text: the first name with its help, then the others."""
    first, *others = trained_kinds()
    rest = [f", or {name}: {AGGREGATORS[name].help}" for name in others]
    return f"{first} ({AGGREGATORS[first].help}){''.join(rest)}"


def find_aggregator(kind: str) -> AggregatorType:
    """Return the entry of that name. Raises ValueError with the nearest names."""
    return look_up(kind, AGGREGATORS, "aggregator")


TEXT_STREAMS = ("own", "fused")


@dataclass(frozen=True)
class Recipe:
    """How the aggregators of an ensemble are made.

    kind:            a name of AGGREGATORS
    options:         of that kind
    attention_up_to: for sabw, the largest side (in latent pixels, at the model's own sample_size) of a map on
                     which the transformer is built; larger maps get depth 0. None: everywhere, as in the
                     paper. With 32, SD 1.5 spends no attention on its seven 64×64 stages, which cost most
    text_stream:     in families whose blocks change text tokens, own: every expert keeps its own; fused:
                     where image tokens are fused, text tokens are, too, by what each expert weighs in the
                     whole image
    Raises ValueError for another text_stream.
    """

    kind: str = "sabw"
    options: Mapping[str, Any] = field(default_factory=dict)
    attention_up_to: int | None = None
    text_stream: str = "own"

    def __post_init__(self) -> None:
        look_up(self.text_stream, dict.fromkeys(TEXT_STREAMS), "text_stream")

    def make(
        self, stage: "Stage", side: int, experts: int, time_width: int, text_width: int, last: bool = False
    ) -> "Aggregator":
        """Make the aggregator of one stage.

        side: of the latent, at the model's own sample_size
        last: whether this is the last stage, where the experts' predictions become one
        Raises ValueError for an unknown kind, or an option that it does not have.
        """
        entry = find_aggregator(self.kind)
        maker: type[Aggregator] = load(entry.make)
        if last and maker.at_output is not None:
            maker = maker.at_output
        options = dict(self.options)
        if self.attention_up_to is not None and -(-side // 2**stage.level) > self.attention_up_to:
            options["depth"] = 0
        known = entry.options()
        for name in options:
            if name not in known:
                raise ValueError(f"aggregator '{self.kind}' has no option '{name}'")
        widths = {"channels": stage.channels, "time_width": time_width, "text_width": text_width}
        return maker(experts=experts, **widths, **options)


def check_options(kind: str, options: Mapping[str, Any], where: str) -> None:
    """Raises UserError for options from a file that are unknown, of another type, or out of bounds."""
    known = AGGREGATORS[kind].options()
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"{where}: aggregator '{kind}' has no option {shown(name)};"
                f" it has {', '.join(sorted(known)) or 'none'}"
            )
        build(known[name].annotation, value, where, f"aggregator.options.{name}")


def count_parameters(module: "nn.Module") -> int:
    """How many numbers a module holds."""
    return sum(parameter.numel() for parameter in module.parameters())
