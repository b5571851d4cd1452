"""Can these experts be fused? Every reason why not, each with both values and what to do."""

from collections.abc import Sequence
from typing import Any

from afa.experts.load import Expert
from afa.families.table import FAMILIES

# What changes the meaning of features or predictions without changing a stage.
CONFIG = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim", "time_cond_proj_dim")
SCHEDULER = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


def mismatches(experts: Sequence[Expert]) -> list[str]:
    """Why the others cannot join the first: one sentence each, none if they can."""
    first, *others = experts
    return [sentence for other in others for sentence in _pair(first, other)]


def _pair(first: Expert, other: Expert) -> list[str]:
    start = f"'{other.name}' cannot join '{first.name}'"
    if first.family != other.family:
        return [f"{start}: it is of family {other.family}, expected {first.family}; experts must share one architecture"]
    found = _stage_mismatch(first, other) or _value_mismatches(first.model.config, other.model.config, CONFIG)
    if first.scheduler is not None and other.scheduler is not None:
        found += _value_mismatches(first.scheduler.config, other.scheduler.config, SCHEDULER)
    if len(first.text_encoders) != len(other.text_encoders):
        found.append(f"it has {len(other.text_encoders)} text encoders, expected {len(first.text_encoders)}; load both as whole pipelines")
    for one, another in zip(first.tokenizers, other.tokenizers, strict=False):
        if one.get_vocab() != another.get_vocab():
            found.append(f"its tokenizer has {len(another)} tokens of its own vocabulary, expected the {len(one)} of '{first.name}'; one tokenizer serves all")
    return [f"{start}: {reason}" for reason in found]


def _stage_mismatch(first: Expert, other: Expert) -> list[str]:
    """The first stage where two experts differ, if they do."""
    stages = FAMILIES[first.family].stages
    mine, theirs = stages(first.model), stages(other.model)
    for expected, stage in zip(mine, theirs, strict=False):
        if expected.name != stage.name:
            return [f"stage {stage.name} stands where {expected.name} is expected; the blocks are cut differently"]
        if expected.channels != stage.channels:
            return [f"stage {stage.name} has {stage.channels} channels, expected {expected.channels}"]
    return [] if len(mine) == len(theirs) else [f"it has {len(theirs)} stages, expected {len(mine)}"]


def _value_mismatches(mine: Any, theirs: Any, names: Sequence[str]) -> list[str]:
    return [
        f"{name} is {theirs.get(name)}, expected {mine.get(name)}"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]
