"""The options of every sampling-time method. No heavy imports: the command line checks and explains them from here."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from afa.errors import UserError, look_up, unknown
from afa.settings import WEIGHT, CheckedOptions, option


@dataclass(frozen=True)
class MethodOptions(CheckedOptions):
    """What the options of all methods share.

    has_maps: the method weighs the experts before the step is made, so weight maps can be saved. own_loop: it makes the
    steps itself and takes no scheduler. needs_guidance: it compares what guidance adds, so guidance must be above 1.
    only_predictions: it combines whole predictions, which may be of different kinds.
    """

    has_maps: ClassVar[bool] = False
    own_loop: ClassVar[bool] = False
    needs_guidance: ClassVar[bool] = False
    only_predictions: ClassVar[bool] = True
    prefix: ClassVar[str] = ""  # of --method-option


@dataclass(frozen=True)
class Single(MethodOptions):
    """One expert as the pipeline it came as: its own VAE, tokenizers, text encoders and scheduler."""

    expert: str | None = option(None, help="which; needed where there are several")


@dataclass(frozen=True)
class SingleInEnsemble(MethodOptions):
    """One expert in the ensemble's frame (its VAE, tokenizers, scheduler): the control for what the frame does."""

    expert: str | None = option(None, help="which; needed where there are several")


@dataclass(frozen=True)
class RandomExpert(MethodOptions):
    """One expert an image, drawn by the image's seed."""

    weights: list[float] | None = option(None, help="chances, one per expert, in any unit (default: equal)")
    frame: str = option(
        "own",
        help="own: each expert as its own pipeline; ensemble: all in the ensemble's frame",
        choices=["own", "ensemble"],
    )


@dataclass(frozen=True)
class NoiseAverage(MethodOptions):
    """The weighted mean of the experts' predictions."""

    has_maps: ClassVar[bool] = True
    weights: list[float] | None = option(
        None, help="one per expert, in any unit (default: equal); an expert of 0 is not run"
    )


@dataclass(frozen=True)
class FeatureMean(MethodOptions):
    """The untrained ensemble: the mean of the experts' features at every stage."""

    has_maps: ClassVar[bool] = True
    only_predictions: ClassVar[bool] = False


@dataclass(frozen=True)
class TimestepExperts(MethodOptions):
    """One expert at a time, by intervals of timesteps."""

    has_maps: ClassVar[bool] = True
    table: str | None = option(
        None, help="FROM-TO:EXPERT,… from the noise down, e.g. 1000-700:a,700-0:b (default: equal intervals)"
    )


@dataclass(frozen=True)
class MagicFusion(MethodOptions):
    """Per pixel the expert to which guidance matters most (saliency-aware noise blending)."""

    has_maps: ClassVar[bool] = True
    needs_guidance: ClassVar[bool] = True
    general: str | None = option(
        None, help="the expert that works alone outside the blended steps (default: the first)"
    )
    mode: int = option(
        1,
        least=1,
        most=2,
        help="1: the general expert alone above t0, then blended; 2: blended above t0, then alone",
    )
    t0: float = option(850.0, **WEIGHT, help="timestep of the change")
    k_general: float = option(1.0, **WEIGHT, help="sharpness of the general expert's saliency")
    k_expert: float = option(1.0, **WEIGHT, help="sharpness of the others' saliency")
    saliency_reference: str = option(
        "general",
        help="general: against the general expert's unconditional prediction; own: each against its own",
        choices=["general", "own"],
    )


@dataclass(frozen=True)
class SuperdiffOr(MethodOptions):
    """Superposition of densities: what any of the experts would draw."""

    own_loop: ClassVar[bool] = True
    temperature: float = option(
        1.0, **WEIGHT, help="factor T of the log-densities; 0: equal shares throughout"
    )
    weights: list[float] | None = option(
        None, help="prior of the experts, in any unit (default: equal); an expert of 0 is not run"
    )
    density: str = option(
        "code",
        help="how log-densities are estimated: as in the published program, or by the paper's theorem",
        choices=["code", "theorem"],
    )


@dataclass(frozen=True)
class SuperdiffAnd(MethodOptions):
    """Superposition of densities: what all experts find equally likely."""

    own_loop: ClassVar[bool] = True
    lift: float = option(
        0.0, help="how much more likely the last expert shall find the image than the others, in nats"
    )


OPTIONS: dict[str, type[MethodOptions]] = {
    "single": Single,
    "single_in_ensemble": SingleInEnsemble,
    "random_expert": RandomExpert,
    "noise_average": NoiseAverage,
    "feature_mean": FeatureMean,
    "timestep_experts": TimestepExperts,
    "magicfusion": MagicFusion,
    "superdiff_or": SuperdiffOr,
    "superdiff_and": SuperdiffAnd,
}


def make_options(method: str, given: Mapping[str, Any]) -> MethodOptions:
    """A method's options, checked. Raises UserError for an unknown method, and for an option that it does not have."""
    try:
        kind = look_up(method, OPTIONS, "method")
    except ValueError as error:
        raise UserError(str(error)) from None
    for name in given:
        _field(method, name)
    return kind(**given)


def read_options(method: str, texts: Sequence[str]) -> MethodOptions:
    """A method's options from KEY=VALUE; lists are written with commas. Raises UserError for what cannot be understood."""
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
    make_options(method, {})  # an unknown method is said before its options
    return make_options(method, {name: _read(method, name, value) for name, value in given.items()})


def explain() -> str:
    """All methods and their options, for a help text."""
    lines = []
    for method, kind in OPTIONS.items():
        lines.append(f"  {method:<20}{kind.__doc__}")
        for field in dataclasses.fields(kind):
            value = f"{field.default:g}" if isinstance(field.default, float) else field.default
            default = "" if value is None else f" (default: {value})"
            lines.append(f"    {field.name:<20}{field.metadata['help']}{default}")
    return "\n".join(lines)


def _field(method: str, name: str) -> dataclasses.Field[Any]:
    """An option of a method. Raises UserError that says whose option it is, or which one was probably meant."""
    own = {field.name: field for field in dataclasses.fields(OPTIONS[method])}
    if name in own:
        return own[name]
    others = [
        other for other, kind in OPTIONS.items() if name in {field.name for field in dataclasses.fields(kind)}
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
    """One value in the type of its field."""
    hint: Any = typing.get_type_hints(OPTIONS[method])[_field(method, name).name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    several = typing.get_origin(hint) is list
    kind = typing.get_args(hint)[0] if several else hint
    try:
        values = [kind(part) for part in (text.split(",") if several else [text])]
    except ValueError:
        what = (
            "numbers with commas between them" if several else "a whole number" if kind is int else "a number"
        )
        raise UserError(f"--method-option {name}={text} is not {what}") from None
    return values if several else values[0]
