"""Can these experts be fused? Every reason why not, each with both values and what to do."""

from collections.abc import Sequence
from typing import Any

from afa.denoiser.placement import fused_stages
from afa.denoiser.schedule import Schedule, is_edm, kind_of
from afa.experts.expert import Expert
from afa.models.registry import FAMILIES
from afa.prompts import reader_of
from afa.text_encoder import width_of

# Settings of schedulers that decide the noise: of diffusion models, and of EDM's schedulers.
SCHEDULER = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "num_train_timesteps",
    "trained_betas",
    "rescale_betas_zero_snr",
)
EDM = ("sigma_min", "sigma_max", "sigma_data", "rho", "sigma_schedule", "num_train_timesteps")

ROUTE = "may differ where only predictions are combined: placement out"


def mismatches(experts: Sequence[Expert], features: bool = True) -> list[str]:
    """Why the other experts cannot join the first.

    features: whether features are fused; otherwise only predictions, which may be of different kinds
    Returns one sentence for each reason; none if they fit.
    """
    first, *others = experts
    return [sentence for other in others for sentence in _pair(first, other, features)]


def kind_mismatches(experts: Sequence[Expert]) -> list[str]:
    """The reasons of mismatches that lie in the schedulers: another kind of prediction, or another noise."""
    first, *others = experts
    return [
        f"{_start(first, other)}: {reason}" for other in others for reason in _kind_mismatches(first, other)
    ]


def _pair(first: Expert, other: Expert, features: bool) -> list[str]:
    start = _start(first, other)
    if first.family != other.family:
        return [
            (
                f"{start}: it is of family {other.family}, expected {first.family}; "
                "experts must share one architecture"
            )
        ]
    interface = FAMILIES[first.family].interface
    found = _stage_mismatches(first, other) + _value_mismatches(
        first.model.config, other.model.config, interface.shared_config_keys
    )
    # a denoiser alone is used as its donor, unless it is said what it is
    if all(one.pipeline or one.pipeline_options for one in (first, other)):
        found += _value_mismatches(first.settings, other.settings, tuple(interface.pipeline_settings))
    found += _kind_mismatches(first, other, features)
    found += _text_mismatches(first, other)
    return [f"{start}: {reason}" for reason in found]


def _start(first: Expert, other: Expert) -> str:
    return f"'{other.name}' cannot join '{first.name}'"


def _kind_mismatches(first: Expert, other: Expert, features: bool = True) -> list[str]:
    """The reasons in two experts' schedulers, if both have one.

    features: False: predictions are converted, unless one scheduler is EDM's
    """
    if first.scheduler is None or other.scheduler is None:
        return []
    convertible = not (is_edm(first.scheduler) or is_edm(other.scheduler))
    if not features and convertible:
        return []
    hint = f" ({ROUTE})" if convertible else ""
    return [f"{reason}{hint}" for reason in scheduler_mismatches(first.scheduler, other.scheduler)]


def scheduler_mismatches(mine: Any, theirs: Any) -> list[str]:
    """The differences of two schedulers that change what a model predicts.

    The whole noise schedules are compared. How a sampler goes through them (timestep_spacing, steps_offset, a
    flow's shift) may differ, since a model is still called at the same timestep with the same noise.
    """
    one, other = kind_of(mine), kind_of(theirs)
    if one != other:
        return [f"prediction_type is {other}, expected {one}"]
    if is_edm(mine) or is_edm(theirs):
        if is_edm(mine) and is_edm(theirs):
            return _value_mismatches(mine.config, theirs.config, EDM)
        return [
            (
                f"its noise schedule is that of {type(theirs).__name__}, "
                f"expected that of {type(mine).__name__}: only one of them is EDM's"
            )
        ]
    expected, found = Schedule.of(mine), Schedule.of(theirs)
    if found.same_noise(expected):
        return []
    if found.alphas_cumprod is None or expected.alphas_cumprod is None or found.steps != expected.steps:
        return [f"num_train_timesteps is {found.steps}, expected {expected.steps}"]
    wanted, had = (
        {name: _shown(scheduler.config.get(name), name) for name in SCHEDULER} for scheduler in (mine, theirs)
    )
    at = int((found.alphas_cumprod - expected.alphas_cumprod).abs().argmax())
    table = (
        f"the noise schedules differ (alphas_cumprod at timestep {at} is {found.alphas_cumprod[at]:.3g}, "
        f"expected {expected.alphas_cumprod[at]:.3g})"
    )
    return _value_mismatches(wanted, had, SCHEDULER) or [table]


def _shown(value: Any, name: str) -> Any:
    """A setting for a message: a list of betas by its ends; off and missing are the same."""
    if isinstance(value, (list, tuple)) and value:
        return f"{len(value)} values from {value[0]:g} to {value[-1]:g}"
    return value or (False if name.startswith("rescale") else "none")


def only_predictions(placement: str | Sequence[str] | None, expert: Expert) -> bool:
    """Whether only the last stage is fused, the prediction. Raises ValueError for an unknown placement."""
    family = FAMILIES[expert.family]
    stages = family.stages(expert.model)
    return fused_stages(placement or family.placement, stages) == [stages[-1].name]


def _stage_mismatches(first: Expert, other: Expert) -> list[str]:
    """The stages that only one of two experts has, or else the stages that differ, in sentences."""
    stages = FAMILIES[first.family].stages
    mine, theirs = ({stage.name: stage for stage in stages(expert.model)} for expert in (first, other))
    lacking, extra = (
        [name for name in mine if name not in theirs],
        [name for name in theirs if name not in mine],
    )
    if lacking or extra:  # then equal names mean different places
        counts = f"it has {len(theirs)} stages, expected {len(mine)}; the blocks are cut differently"
        return [
            f"stages {_in_short(names)} are {how}; {counts}"
            for names, how in ((lacking, "missing"), (extra, "not expected"))
            if names
        ]
    alike: dict[str, list[str]] = {}
    for name, stage in theirs.items():
        if stage.channels != mine[name].channels:
            alike.setdefault(f"has {stage.channels} channels, expected {mine[name].channels}", []).append(
                name
            )
        if stage.level != mine[name].level:
            alike.setdefault(f"is at level {stage.level}, expected {mine[name].level}", []).append(name)
    return [f"stage {name} {difference}{_others(rest)}" for difference, (name, *rest) in alike.items()]


def _in_short(names: Sequence[str]) -> str:
    most = 6
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _others(names: Sequence[str]) -> str:
    return f" (and so {', '.join(names)})" if names else ""


def _text_mismatches(first: Expert, other: Expert) -> list[str]:
    """The differences of text encoders and tokenizers that keep two experts from sharing a prompt."""
    mine, theirs = first.text_encoders, other.text_encoders
    if len(mine) != len(theirs):
        return [f"it has {len(theirs)} text encoders, expected {len(mine)}; load both as whole pipelines"]
    found = []
    for number, (one, another) in enumerate(zip(mine, theirs, strict=True), start=1):
        expected, width = (width_of(encoder) for encoder in (one, another))
        if width != expected:
            found.append(f"text encoder {number} is {width} wide, expected {expected}")
    both = (map(reader_of, expert.tokenizers) for expert in (first, other))
    for one, another in zip(*both, strict=False):
        if one.get_vocab() != another.get_vocab():
            found.append(
                f"its tokenizer has {len(another)} tokens of its own vocabulary, "
                f"expected the {len(one)} of '{first.name}'; one tokenizer serves all"
            )
    return found


def _value_mismatches(mine: Any, theirs: Any, names: Sequence[str]) -> list[str]:
    one, other = ({name: _plain(settings.get(name)) for name in names} for settings in (mine, theirs))
    return [f"{name} is {other[name]}, expected {one[name]}" for name in names if one[name] != other[name]]


def _plain(value: Any) -> Any:
    """A tuple as a list, since a config that was saved and loaded has lists."""
    return list(value) if isinstance(value, tuple) else value
