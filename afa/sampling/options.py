"""The options of every sampling-time method. No heavy imports: the command line explains them from here."""

from dataclasses import dataclass
from typing import ClassVar

from afa.settings import SHARE, WEIGHT, CheckedOptions, option


@dataclass(frozen=True)
class MethodOptions(CheckedOptions):
    """Base of all options, and those of a method that has none."""

    prefix: ClassVar[str] = ""  # of --method-option


@dataclass(frozen=True)
class OneExpert(MethodOptions):
    """Which of the experts."""

    expert: str | None = option(None, help="name of the expert; needed if there are several")


@dataclass(frozen=True)
class RandomExpert(MethodOptions):
    """One expert for each image, chosen by the image's seed."""

    weights: list[float] | None = option(
        None, help="probabilities, one per expert, in any unit (default: equal)"
    )
    frame: str = option(
        "own",
        help="own: each expert as its own pipeline; ensemble: all in the ensemble's frame",
        choices=["own", "ensemble"],
    )


@dataclass(frozen=True)
class NoiseAverage(MethodOptions):
    """The weighted mean of the experts' predictions."""

    weights: list[float] | None = option(
        None, help="one per expert, in any unit (default: equal); an expert with 0 is not run"
    )


@dataclass(frozen=True)
class TimestepExperts(MethodOptions):
    """One expert at a time, by intervals of timesteps."""

    table: str | None = option(
        None, help="FROM-TO:EXPERT,… from the noise down, e.g. 1000-700:a,700-0:b (default: equal intervals)"
    )


@dataclass(frozen=True)
class ExpertSwitch(MethodOptions):
    """One expert at a time, in turns of a few steps."""

    every: int = option(1, least=1, most=10**4, help="steps of one turn")
    order: list[str] | None = option(
        None, help="names of experts, in turn; one may come more than once (default: the experts' order)"
    )


@dataclass(frozen=True)
class MagicFusion(MethodOptions):
    """Per pixel the expert to which guidance matters most (saliency-aware noise blending)."""

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
class Loratorio(MethodOptions):
    """Per patch the experts whose predictions depart most from the base model's."""

    patch: int = option(4, least=1, most=1024, help="side of a patch in latent pixels")
    temperature: float = option(
        1.0,
        above=0,
        most=10**6,
        help="of the softmax over experts: small values let the expert that departs most decide alone",
    )
    recenter: float = option(
        0.5, **SHARE, help="share of the base model in the prediction without the prompt; 0: none"
    )


@dataclass(frozen=True)
class SuperdiffOr(MethodOptions):
    """Superposition of densities: what any of the experts would draw."""

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

    lift: float = option(
        0.0, help="how much more likely the last expert shall find the image than the others, in nats"
    )
