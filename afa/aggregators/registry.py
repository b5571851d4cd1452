"""The registry of aggregators, and how an ensemble's stages get theirs.

No heavy imports: help comes from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from afa import defaults
from afa.aggregators.options import AggregatorOptions, FixedOptions, SABWOptions
from afa.errors import UserError, look_up
from afa.lazy import load
from afa.schema import build, hints_of, shown
from afa.settings import check_value

if TYPE_CHECKING:
    from torch import nn

    from afa.aggregators.base import Aggregator
    from afa.stages.stage import Stage

PUBLISHED = "sabw"  # the paper's, of a recipe that names none; what commands choose is in afa.defaults
EVERYWHERE = 2**16  # a side that no map reaches: attention on all maps


@dataclass(frozen=True)
class AggregatorType:
    """One kind of aggregator.

    make:    "module:Class" of the Aggregator; imported when it is asked for. Its arguments are experts,
             channels, time_width, text_width, and its options by keyword
    help:    what it is, for `--aggregator`
    options: the dataclass of its options, each a flag of `afa train` and `afa inspect`
    trained: whether it has weights to train, so that `afa train` offers it
    """

    make: str
    help: str
    options: type[AggregatorOptions] = AggregatorOptions
    trained: bool = True

    def defaults(self) -> dict[str, Any]:
        """Return the options that have a default, with it."""
        made = {
            one.name: one.default_factory() if callable(one.default_factory) else one.default
            for one in fields(self.options)
        }
        return {name: value for name, value in made.items() if value is not MISSING}


AGGREGATORS: dict[str, AggregatorType] = {
    "sabw": AggregatorType("afa.aggregators.sabw:SABW", "the paper's", SABWOptions),
    "stitch": AggregatorType(
        "afa.aggregators.stitch:Stitch", "every expert keeps a path of its own", SABWOptions
    ),
    "mean": AggregatorType("afa.aggregators.base:Mean", "every expert weighs the same", trained=False),
    "fixed": AggregatorType(
        "afa.aggregators.base:Fixed", "the weights that are given", FixedOptions, trained=False
    ),
}


def trained_kinds() -> list[str]:
    """Return the names of the aggregators that can be trained."""
    return [name for name, entry in AGGREGATORS.items() if entry.trained]


def explain_trained() -> str:
    """Return a help text of the aggregators that can be trained."""
    first, *others = trained_kinds()
    rest = [f", or {name}: {AGGREGATORS[name].help}" for name in others]
    return f"{first} ({AGGREGATORS[first].help}){''.join(rest)} (default: {defaults.AGGREGATOR})"


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
    shared_guidance: both predictions of guidance are blended by the weights of the one with the prompt
    Raises ValueError for another text_stream.
    """

    kind: str = PUBLISHED
    options: Mapping[str, Any] = field(default_factory=dict)
    attention_up_to: int | None = None
    text_stream: str = "own"
    shared_guidance: bool = False

    def __post_init__(self) -> None:
        look_up(self.text_stream, dict.fromkeys(TEXT_STREAMS), "text_stream")

    @classmethod
    def by_size(
        cls,
        stages: "Sequence[Stage]",
        side: int,
        kind: str | None = None,
        options: Mapping[str, Any] | None = None,
        attention_up_to: int | None = None,
        text_stream: str = "own",
    ) -> "Recipe":
        """Return a recipe in which all that is not given is chosen by the experts' size: see afa.defaults.

        stages: of an expert
        side:   of the latent, at the model's own sample_size
        The rest is as given; None, or missing in the options: not given.
        """
        kind, given = kind or defaults.AGGREGATOR, dict(options or {})
        chosen = find_aggregator(kind).options.by_size(max(stage.channels for stage in stages), given)
        if attention_up_to is None:
            levels = [stage.level + stage.upsamples for stage in stages if stage.attends]  # before upsampling
            sides = [-(-side // 2**level) for level in levels]
            attention_up_to = max([defaults.SMALL_SIDE, *sides]) if "depth" in chosen else EVERYWHERE
        return cls(kind, chosen | given, attention_up_to, text_stream)

    def make(
        self, stage: "Stage", side: int, experts: int, time_width: int, text_width: int, last: bool = False
    ) -> "Aggregator":
        """Make the aggregator of one stage.

        side: of the latent, at the model's own sample_size
        last: whether this is the last stage, where the experts' predictions become one
        Raises ValueError for an unknown kind, an option that it does not have, and attention_up_to where
        there is no attention.
        """
        entry = find_aggregator(self.kind)
        maker: type[Aggregator] = load(entry.make)
        if last and maker.at_output is not None:
            maker = maker.at_output
        options = dict(self.options)
        if self.attention_up_to is not None and -(-side // 2**stage.level) > self.attention_up_to:
            if "depth" not in (own.name for own in fields(entry.options)):
                nothing = f"aggregator '{self.kind}' has no attention to spare"
                raise ValueError(f"{nothing}; leave out attention_up_to")
            options["depth"] = 0
        for name in options:
            if name not in (own.name for own in fields(entry.options)):
                raise ValueError(f"aggregator '{self.kind}' has no option '{name}'")
        widths = {"channels": stage.channels, "time_width": time_width, "text_width": text_width}
        return maker(experts=experts, **widths, **entry.defaults() | options)


def check_options(kind: str, options: Mapping[str, Any], where: str) -> None:
    """Raise UserError for options from a file that are unknown, of another type, or out of bounds."""
    own: Any = AGGREGATORS[kind].options
    known = {one.name: one for one in fields(own)}
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"{where}: aggregator '{kind}' has no option {shown(name)};"
                f" it has {', '.join(sorted(known)) or 'none'}"
            )
        build(hints_of(own)[name], value, where, f"aggregator.options.{name}")
        check_value(own, known[name], value, f"{where}: aggregator.options.{name}")


def count_parameters(module: "nn.Module") -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
