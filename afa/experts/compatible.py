"""Can these experts be fused? Every reason why not, each with both values and what to do."""

from collections.abc import Sequence
from typing import Any

from afa.experts.load import Expert
from afa.families.table import FAMILIES
from afa.text import width_of

# What changes the meaning of features or predictions without changing a stage.
CONFIG = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "time_cond_proj_dim",
)
SCHEDULER = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


def mismatches(experts: Sequence[Expert]) -> list[str]:
    """Why the others cannot join the first: one sentence each, none if they can."""
    first, *others = experts
    return [sentence for other in others for sentence in _pair(first, other)]


def _pair(first: Expert, other: Expert) -> list[str]:
    start = f"'{other.name}' cannot join '{first.name}'"
    if first.family != other.family:
        return [f"{start}: it is of family {other.family}, expected {first.family}; experts must share one architecture"]
    found = _stage_mismatches(first, other) + _value_mismatches(first.model.config, other.model.config, CONFIG)
    if first.scheduler is not None and other.scheduler is not None:
        found += _value_mismatches(first.scheduler.config, other.scheduler.config, SCHEDULER)
    found += _text_mismatches(first, other)
    return [f"{start}: {reason}" for reason in found]


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
    return [f"{name} is {theirs.get(name)}, expected {mine.get(name)}" for name in names if mine.get(name) != theirs.get(name)]
