"""Show experts, whether they can be fused, and what their ensemble would cost; no weights are loaded.

Config files and the headers of weight files are read, so that broken, incomplete and unlike models are found before a
GPU minute is spent. A saved ensemble is shown with its own experts and aggregators. Hub ids are downloaded once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import UserError
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.options import COUNT, CheckedOptions, option

if TYPE_CHECKING:
    from afa.inspection import Subject

EXAMPLES = [
    "afa inspect demo:curves demo:angles demo:patterns",
    "afa inspect demo:curves demo:angles --placement out --json",
    "afa inspect demo:ensemble",
    "afa inspect --config flux --count 2 --placement double",
]
FUSION = ("aggregator", "placement", "hidden", "heads", "depth", "weights", "attention_up_to")  # a saved ensemble has its own


@dataclass(frozen=True)
class Options(CheckedOptions):
    """What to show, and how the experts would be fused."""

    experts: list[str] = option(
        [],
        place=True, help="a diffusers folder, .safetensors file of original layout or org/name@revision, each optionally NAME=… and …+LORA;"
        " or one saved ensemble",
        positional=True,
    )
    config: str | None = option(
        None,
        help="sd15, sd21, sd21-base, sdxl, sd3, sd35, sd35-large, flux, flux-schnell or a folder: of single files; without EXPERT, the"
        " architecture to show",
    )
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    count: int | None = option(None, least=1, most=1000, help="with --config and without EXPERT: how many experts (default: 3)")
    aggregator: str | None = option(None, help="kind of aggregator: sabw, stitch, mean or fixed (default: sabw)")
    placement: str | None = option(
        None, help="fused stages: layers (all), blocks, every-K, double (FLUX), out, or names such as M00,OUT11 (default: the family's)"
    )
    hidden: int | None = option(None, least=1, most=2**20, help="width inside the aggregators (default: 128)")
    heads: int | None = option(None, least=1, most=2**20, help="attention heads of the aggregators (default: 8)")
    depth: int | None = option(None, least=0, most=1000, help="transformer layers of the aggregators; 0: none (default: 2)")
    weights: list[float] | None = option(None, help="of aggregator fixed: one weight per expert")
    attention_up_to: int | None = option(
        None, least=0, most=2**16, help="build the transformer only on maps up to this side in latent pixels (default: everywhere)"
    )
    resolution: int | None = option(None, least=1, most=2**16, help="side of the images in pixels (default: the experts' own)")
    batch_size: int = option(1, **COUNT, help="images at once; guidance doubles the cost of each")
    json: bool = option(False, help="print one JSON document instead of tables")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experts and self.config is None:
            raise UserError("give EXPERT..., or --config sd15, sdxl, sd35, flux or another; afa inspect --help names them")
        if not self.experts and self.prediction_type is not None:
            raise UserError(f"--prediction-type {self.prediction_type} is for EXPERT, and none is given; leave it out")
        if self.experts and self.count is not None:
            raise UserError(f"--count {self.count} is for --config without EXPERT; leave out one of them")


def run(options: Options) -> None:
    """Print the report; then, if the experts cannot be fused, raise UserError with every reason."""
    from afa.inspection import facts

    found = facts(_subject(options), options.resolution, options.batch_size)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        from afa.cli.inspect_report import report

        print(report(found))
    if found["mismatches"]:
        raise UserError("; ".join(found["mismatches"]))


def _subject(options: Options) -> "Subject":
    from afa.aggregators.table import Recipe
    from afa.checkpoint.manifest import MANIFEST
    from afa.files import settled
    from afa.inspection import Subject

    ensembles = [source for source in options.experts if (settled(Path(source)) / MANIFEST).is_file()]
    if ensembles:
        _check_alone(options, ensembles[0])
        return Subject.from_ensemble(Path(ensembles[0]))
    inner: dict[str, Any] = {name: getattr(options, name) for name in ("hidden", "heads", "depth", "weights")}
    given = {name: value for name, value in inner.items() if value is not None}
    recipe = Recipe(options.aggregator or "sabw", given, options.attention_up_to)
    placement = options.placement
    if not options.experts:
        assert options.config is not None
        return Subject.from_config(options.config, 3 if options.count is None else options.count, recipe, placement)
    return Subject.from_sources(options.experts, options.config, recipe, placement, options.prediction_type)


def _check_alone(options: Options, ensemble: str) -> None:
    """Raises UserError for what a saved ensemble brings along itself."""
    if len(options.experts) > 1:
        other = next(source for source in options.experts if source != ensemble)
        raise UserError(f"{ensemble} is a saved ensemble; inspect it alone, without {other}")
    for name in ("config", "prediction_type", *FUSION):
        if getattr(options, name) is not None:
            raise UserError(f"{ensemble} is a saved ensemble with settings of its own; leave out --{name.replace('_', '-')}")
