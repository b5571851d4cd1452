"""The options of every aggregator. No heavy imports: help comes from here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from afa.defaults import widths
from afa.settings import CheckedOptions, option

SEEN = ("text", "time", "place")  # what the weights of SABW depend on besides the features


@dataclass(frozen=True)
class AggregatorOptions(CheckedOptions):
    """Base of all options, and those of an aggregator that has none."""

    prefix: ClassVar[str] = ""  # in Python and in a manifest they are no flags

    @classmethod
    def by_size(cls, widest: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that commands choose by the experts' size where they are not given.

        widest: channels of the experts' widest stage
        given:  options that the user gave
        """
        return {}


@dataclass(frozen=True)
class SABWOptions(AggregatorOptions):
    """Of SABW and of Stitch. The defaults are the paper's; commands choose by the experts' size."""

    hidden: int = option(128, least=1, most=16384, help="width inside the aggregators, a multiple of --heads")
    heads: int = option(8, least=1, most=1024, help="attention heads of the aggregators")
    depth: int = option(2, least=0, most=100, help="transformer layers of the aggregators; 0: none")
    dropout: float = option(
        0.0,
        least=0,
        below=1,
        help="share of the aggregators' activations that is dropped at random in training",
    )
    ignore: list[str] | None = option(
        None, help="what the weights must not depend on, for ablations", choices=list(SEEN)
    )

    @classmethod
    def by_size(cls, widest: int, given: Mapping[str, Any]) -> dict[str, Any]:
        return dict(widths(widest, given.get("hidden"), given.get("heads")))


@dataclass(frozen=True)
class FixedOptions(AggregatorOptions):
    """Of Fixed."""

    weights: list[float] = option(help="one weight per expert")
