"""Can these experts be fused? Every reason why not, each with both values and what to do."""

from collections.abc import Sequence
from typing import Any

from afa.denoiser.placement import fused_stages
from afa.denoiser.schedule import kind_of
from afa.experts.load import Expert
from afa.families.table import FAMILIES
from afa.text import width_of

SCHEDULER = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


ROUTE = "may differ where only predictions are combined: placement out"


def mismatches(experts: Sequence[Expert], features: bool = True) -> list[str]:
    """Why the others cannot join the first: one sentence each, none if they can.

    features: they are to be fused, not only predictions, which may be of different kinds.
    """
    first, *others = experts
    return [sentence for other in others for sentence in _pair(first, other, features)]


def kind_mismatches(experts: Sequence[Expert]) -> list[str]:
    """Why features of the others mean something else than the first's: they predict another thing, or at another noise."""
    first, *others = experts
    return [f"{_start(first, other)}: {reason}" for other in others for reason in _kind_mismatches(first, other)]


def _pair(first: Expert, other: Expert, features: bool) -> list[str]:
    start = _start(first, other)
    if first.family != other.family:
        return [f"{start}: it is of family {other.family}, expected {first.family}; experts must share one architecture"]
    found = _stage_mismatches(first, other) + _value_mismatches(first.model.config, other.model.config, FAMILIES[first.family].call.alike)
    found += _kind_mismatches(first, other) if features else []
    found += _text_mismatches(first, other)
    return [f"{start}: {reason}" for reason in found]


def _start(first: Expert, other: Expert) -> str:
    return f"'{other.name}' cannot join '{first.name}'"


def _kind_mismatches(first: Expert, other: Expert) -> list[str]:
    """By their schedulers, where both have one."""
    if first.scheduler is None or other.scheduler is None:
        return []
    mine, theirs = kind_of(first.scheduler), kind_of(other.scheduler)
    if mine != theirs:
        return [f"prediction_type is {theirs}, expected {mine} ({ROUTE})"]
    return [f"{reason} ({ROUTE})" for reason in _value_mismatches(first.scheduler.config, other.scheduler.config, SCHEDULER)]


def only_predictions(placement: str | Sequence[str] | None, expert: Expert) -> bool:
    """Whether nothing before the last stage is fused. Raises ValueError for a placement that does not exist."""
    family = FAMILIES[expert.family]
    stages = family.stages(expert.model)
    return fused_stages(placement or family.placement, stages) == [stages[-1].name]


def _stage_mismatches(first: Expert, other: Expert) -> list[str]:
    """Stages that only one of two experts has; if there are none, stages that differ, alike differences in one sentence."""
    stages = FAMILIES[first.family].stages
    mine, theirs = ({stage.name: stage for stage in stages(expert.model)} for expert in (first, other))
    lacking, extra = [name for name in mine if name not in theirs], [name for name in theirs if name not in mine]
    if lacking or extra:  # then equal names mean different places
        counts = f"it has {len(theirs)} stages, expected {len(mine)}; the blocks are cut differently"
        return [
            f"stages {', '.join(names)} are {how}; {counts}"
            for names, how in ((lacking, "missing"), (extra, "not expected"))
            if names
        ]
    alike: dict[str, list[str]] = {}
    for name, stage in theirs.items():
        if stage.channels != mine[name].channels:
            alike.setdefault(f"has {stage.channels} channels, expected {mine[name].channels}", []).append(name)
        if stage.level != mine[name].level:
            alike.setdefault(f"is at level {stage.level}, expected {mine[name].level}", []).append(name)
    return [f"stage {name} {difference}{_others(rest)}" for difference, (name, *rest) in alike.items()]


def _others(names: Sequence[str]) -> str:
    return f" (and so {', '.join(names)})" if names else ""


def _text_mismatches(first: Expert, other: Expert) -> list[str]:
    """What keeps two experts from being given the same prompt."""
    mine, theirs = first.text_encoders, other.text_encoders
    if len(mine) != len(theirs):
        return [f"it has {len(theirs)} text encoders, expected {len(mine)}; load both as whole pipelines"]
    found = []
    for number, (one, another) in enumerate(zip(mine, theirs, strict=True), start=1):
        expected, width = (width_of(encoder) for encoder in (one, another))
        if width != expected:
            found.append(f"text encoder {number} is {width} wide, expected {expected}")
    for one, another in zip(first.tokenizers, other.tokenizers, strict=False):
        if one.get_vocab() != another.get_vocab():
            found.append(
                f"its tokenizer has {len(another)} tokens of its own vocabulary, expected the {len(one)} of '{first.name}'; one tokenizer serves all"
            )
    return found


def _value_mismatches(mine: Any, theirs: Any, names: Sequence[str]) -> list[str]:
    one, other = ({name: _plain(settings.get(name)) for name in names} for settings in (mine, theirs))
    return [f"{name} is {other[name]}, expected {one[name]}" for name in names if one[name] != other[name]]


def _plain(value: Any) -> Any:
    """A tuple that went through a file is a list."""
    return list(value) if isinstance(value, tuple) else value
