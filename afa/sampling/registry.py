"""The registry of sampling-time methods.

No heavy imports: command line, page, comparisons and docs read it.
"""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.errors import UserError, unknown
from afa.lazy import load
from afa.sampling import options as of
from afa.sampling.options import MethodOptions
from afa.settings import kind_of, one_ahead

if TYPE_CHECKING:
    from afa.ensemble import Ensemble
    from afa.sampling.sample import Sampler

Candidates = Callable[[Sequence[str], Sequence[str]], list[dict[str, Any]]]


@dataclass(frozen=True)
class SamplingMethod:
    """Everything about one way to combine experts while sampling.

    make:             "module:function" with function(Ensemble, options) -> Sampler; imported when it is asked
                      for
    title:            of its row in tables, and on the page; where each is set, {} is the expert's name
    help:             what it does, for `--method`
    row:              what its row in a comparison is, for `--methods list` and the page
    options:          the dataclass of its options
    candidates:       (experts' names, the same from best to worst) -> options worth trying in a comparison,
                      the default first
    cost:             what a step costs: "one model", "all experts" (one prediction of each) or "ensemble"
    each:             it is one method for every expert, which its option `expert` names
    has_maps:         it weighs the experts before the step is made, so weight maps can be saved
    own_loop:         it makes the steps itself and takes no scheduler
    needs_guidance:   it compares what guidance adds, so guidance must be above 1
    only_predictions: it combines whole predictions, which may be of different kinds
    based:            it needs the model that the experts were tuned from; `make` takes it as third argument
    teaches:          its prediction depends on latents, timestep and caption alone, so a student can learn it
    """

    make: str
    title: str
    help: str
    row: str
    options: type[MethodOptions] = MethodOptions
    candidates: Candidates = lambda names, ranking: [{}]
    cost: str = "one model"
    each: bool = False
    has_maps: bool = False
    own_loop: bool = False
    needs_guidance: bool = False
    only_predictions: bool = True
    based: bool = False
    teaches: bool = False


def _orders(names: Sequence[str], ranking: Sequence[str]) -> list[dict[str, Any]]:
    """Return equal intervals of the timesteps, in up to six orders of the experts."""
    edges = [round(1000 * (1 - place / len(names))) for place in range(len(names) + 1)]
    intervals = list(itertools.pairwise(edges))
    orders = itertools.islice(itertools.permutations(names), 6)
    return [
        {
            "table": ",".join(
                f"{top}-{bottom}:{name}" for name, (top, bottom) in zip(order, intervals, strict=True)
            )
        }
        for order in orders
    ]


def _turns(names: Sequence[str], ranking: Sequence[str]) -> list[dict[str, Any]]:
    """Return turns of one step and of five; each of the best three experts begins once."""
    orders = [[*ranking[start:], *ranking[:start]] for start in range(min(3, len(ranking)))]
    return [{"every": every, "order": order} for every in (1, 5) for order in orders]


SAMPLING_METHODS: dict[str, SamplingMethod] = {
    "single": SamplingMethod(
        "afa.sampling.base:single",
        title="expert {}",
        help="One expert as its own pipeline, with its own VAE, tokenizers, text encoders and scheduler.",
        row="each expert alone, as its own pipeline",
        options=of.OneExpert,
        each=True,
    ),
    "single_in_ensemble": SamplingMethod(
        "afa.sampling.base:single_in_ensemble",
        title="expert {} in the frame",
        help="One expert in the ensemble's frame (its VAE, tokenizers, scheduler):"
        " it shows what the frame changes.",
        row="each expert alone in the ensemble's frame (its VAE, text encoders and scheduler):"
        " it shows what the frame changes",
        options=of.OneExpert,
        each=True,
        teaches=True,
    ),
    "random_expert": SamplingMethod(
        "afa.sampling.base:random_expert",
        title="random expert",
        help="One expert for each image, chosen by the image's seed.",
        row="one expert for each image, chosen by its seed",
        options=of.RandomExpert,
    ),
    "noise_average": SamplingMethod(
        "afa.sampling.average:noise_average",
        title="noise average",
        help="The weighted mean of the experts' predictions.",
        row="the experts' predictions, averaged",
        options=of.NoiseAverage,
        candidates=lambda names, ranking: [{"weights": weights} for weights in one_ahead(len(names))],
        cost="all experts",
        has_maps=True,
        teaches=True,
    ),
    "feature_mean": SamplingMethod(
        "afa.sampling.average:feature_mean",
        title="feature mean (untrained)",
        help="The untrained ensemble: the mean of the experts' features at every stage.",
        row="the untrained ensemble: the experts' features, averaged at every stage",
        cost="ensemble",
        has_maps=True,
        only_predictions=False,
        teaches=True,
    ),
    "timestep_experts": SamplingMethod(
        "afa.sampling.average:timestep_experts",
        title="timestep experts",
        help="One expert at a time, by intervals of timesteps.",
        row="each expert in its own range of timesteps",
        options=of.TimestepExperts,
        candidates=_orders,
        has_maps=True,
        teaches=True,
    ),
    "expert_switch": SamplingMethod(
        "afa.sampling.average:expert_switch",
        title="expert switch",
        help="One expert at a time, in turns of a few steps (LoRA Switch).",
        row="one expert at a time, in turns of a few steps",
        options=of.ExpertSwitch,
        candidates=_turns,
        has_maps=True,
    ),
    "magicfusion": SamplingMethod(
        "afa.sampling.magicfusion:magicfusion",
        title="MagicFusion",
        help="Per pixel the expert to which guidance matters most (saliency-aware noise blending).",
        row="saliency decides, pixel by pixel, whose prediction counts",
        options=of.MagicFusion,
        candidates=lambda names, ranking: [
            {"general": general, "mode": mode, "t0": t0}
            for general in ranking
            for mode, t0 in ((1, 850.0), (2, 600.0))
        ],
        cost="all experts",
        has_maps=True,
        needs_guidance=True,
        teaches=True,
    ),
    "loratorio": SamplingMethod(
        "afa.sampling.loratorio:loratorio",
        title="LoRAtorio",
        help="Per patch the experts that depart most from the model they were tuned from (--base).",
        row="patch by patch, whose prediction departs most from the base model's counts most",
        options=of.Loratorio,
        candidates=lambda names, ranking: [
            {"patch": patch, "temperature": temperature}
            for patch in (4, 2)
            for temperature in (1.0, 0.1, 0.01)
        ],
        cost="all experts",
        has_maps=True,
        based=True,
    ),
    "superdiff_or": SamplingMethod(
        "afa.sampling.superdiff:superdiff_or",
        title="SuperDiff OR",
        help="Superposition of densities: what any of the experts would draw.",
        row="superposed densities: what any expert would draw",
        options=of.SuperdiffOr,
        candidates=lambda names, ranking: [
            {"temperature": temperature, "density": density}
            for density in ("code", "theorem")
            for temperature in (1.0, 0.1)
        ],
        cost="all experts",
        own_loop=True,
    ),
    "superdiff_and": SamplingMethod(
        "afa.sampling.superdiff:superdiff_and",
        title="SuperDiff AND",
        help="Superposition of densities: what all experts find equally likely.",
        row="superposed densities: what all experts would draw",
        options=of.SuperdiffAnd,
        cost="all experts",
        own_loop=True,
    ),
}


def teaching_methods() -> list[str]:
    """Return the names of the methods that a student can learn."""
    return [name for name, method in SAMPLING_METHODS.items() if method.teaches]


def find_method(name: str) -> SamplingMethod:
    """Return the entry of that name. Raises UserError with the nearest names."""
    if name not in SAMPLING_METHODS:
        raise UserError(unknown(name, SAMPLING_METHODS, "method"))
    return SAMPLING_METHODS[name]


def make_sampler(name: str, ensemble: "Ensemble", *, base: object = None, **options: Any) -> "Sampler":
    """Return the sampler of a method, which draws with the ensemble's experts on their device.

    ensemble: its experts and its frame are used, its aggregators are not
    base:     the model that the experts were tuned from, as Ensemble.from_experts takes it
    options:  see afa.sampling.options, or `afa generate --help`
    Raises UserError for an unknown method, an option of another method, a value that does not fit, and a base
    that is missing or not needed.
    """
    checked = make_options(name, options)
    check_base(name, base)
    more = () if base is None else (base,)
    sampler: Sampler = load(SAMPLING_METHODS[name].make)(ensemble, checked, *more)
    return sampler


def check_base(method: str, base: object) -> None:
    """Raise UserError if a method needs a base model and gets none, or gets one that it would not use."""
    if SAMPLING_METHODS[method].based and base is None:
        raise UserError(
            f"{method} needs the model that the experts were tuned from; give it with --base"
            " (afa generate, afa evaluate) or base= (Python)"
        )
    if base is not None and not SAMPLING_METHODS[method].based:
        raise UserError(f"{method} does not use the model that the experts were tuned from; leave --base out")


def make_options(method: str, given: Mapping[str, Any]) -> MethodOptions:
    """Check and return the options of a method.

    Raises UserError for an unknown method, and for an option that it does not have.
    """
    kind = find_method(method).options
    for name in given:
        _field(method, name)
    return kind(**given)


def read_options(method: str, texts: Sequence[str]) -> MethodOptions:
    """Read the options of a method from KEY=VALUE; the values of a list are separated by commas.

    Raises UserError for text that has another form.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--method-option {text} has no value; write KEY=VALUE")
        if name in given:
            raise UserError(
                f"--method-option {name} is given twice, as {given[name]} and as {value}; leave out one"
            )
        given[name] = value
    make_options(method, {})  # an unknown method is an error before its options are
    return make_options(method, {name: _read(method, name, value) for name, value in given.items()})


def explain() -> str:
    """Return all methods and their options, for a help text."""
    lines = []
    for method, entry in SAMPLING_METHODS.items():
        lines.append(f"  {method:<20}{entry.help}")
        for field in dataclasses.fields(entry.options):
            value = f"{field.default:g}" if isinstance(field.default, float) else field.default
            default = "" if value is None else f" (default: {value})"
            lines.append(f"    {field.name:<20}{field.metadata['help']}{default}")
    return "\n".join(lines)


def _field(method: str, name: str) -> dataclasses.Field[Any]:
    """Return an option of a method.

    Raises UserError that names the methods that have the option, or the nearest name.
    """
    own = {field.name: field for field in dataclasses.fields(SAMPLING_METHODS[method].options)}
    if name in own:
        return own[name]
    others = [
        other
        for other, entry in SAMPLING_METHODS.items()
        if name in {field.name for field in dataclasses.fields(entry.options)}
    ]
    if others:
        has = f"which has {', '.join(own)}" if own else "which has none"
        raise UserError(f"{name} is an option of {', '.join(others)}, not of {method}, {has}")
    raise UserError(
        unknown(name, own, f"option of {method},")
        if own
        else f"method {method} has no options; leave out {name}"
    )


def _read(method: str, name: str, text: str) -> Any:
    """Return a value in the type of its field."""
    hints = typing.get_type_hints(SAMPLING_METHODS[method].options)
    kind, several = kind_of(hints[_field(method, name).name])
    try:
        values = [kind(part) for part in (text.split(",") if several else [text])]
    except ValueError:
        what = (
            "numbers with commas between them" if several else "a whole number" if kind is int else "a number"
        )
        raise UserError(f"--method-option {name}={text} is not {what}") from None
    return values if several else values[0]
