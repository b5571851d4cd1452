"""Placement: the stages of an ensemble that are fused. At all others every expert keeps its own features."""

import re
from collections.abc import Callable, Sequence

from afa.errors import unknown
from afa.stages.stage import Stage


def _layers(stages: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def _blocks(stages: Sequence[Stage]) -> list[str]:
    following = [*stages[1:], None]
    return [
        stage.name
        for stage, after in zip(stages, following, strict=True)
        if not after or (stage.block and after.block != stage.block)
    ]


def _out(stages: Sequence[Stage]) -> list[str]:
    return [stages[-1].name]


def _double(stages: Sequence[Stage]) -> list[str]:
    chosen = [stage.name for stage in stages if stage.group == "double"]
    if not chosen:
        raise ValueError(
            "placement double is for models with double and single blocks (FLUX), "
            "and this one has none; take layers"
        )
    return [*chosen, stages[-1].name]


def _every(stages: Sequence[Stage], count: int) -> list[str]:
    """Return the count-th, the 2·count-th … and the last stage."""
    return [
        stage.name
        for place, stage in enumerate(stages, start=1)
        if place % count == 0 or place == len(stages)
    ]


PLACEMENTS: dict[str, Callable[[Sequence[Stage]], list[str]]] = {
    "layers": _layers,  # all stages, as in the paper
    "blocks": _blocks,  # the last stage of every diffusers block
    "double": _double,  # FLUX's double blocks
    "out": _out,  # only the predictions: a router
}
EVERY = re.compile(r"every-([1-9]\d*)")  # every-4: each fourth stage
# offered to the user, the most expensive first
SHOWN = ("layers", "blocks", "every-2", "double", "every-4", "every-8", "out")


def fused_stages(placement: str | Sequence[str], stages: Sequence[Stage]) -> list[str]:
    """Return the names of the fused stages, in the order they run.

    placement: a name of PLACEMENTS, every-K, a list of stage names, or a string of them: "IN04,M00,OUT11"
    stages:    of the model
    Raises ValueError for an unknown name, and if the last stage is missing: an ensemble makes one prediction.
    """
    if isinstance(placement, str) and placement in PLACEMENTS:
        return PLACEMENTS[placement](stages)
    if isinstance(placement, str) and (found := EVERY.fullmatch(placement)):
        return _every(stages, int(found[1]))
    chosen = (
        [name.strip() for name in placement.split(",")] if isinstance(placement, str) else list(placement)
    )
    names = [stage.name for stage in stages]
    for name in chosen:
        if name not in names:
            raise ValueError(unknown(name, [*PLACEMENTS, "every-K", *names], "placement or stage"))
    if names[-1] not in chosen:
        raise ValueError(
            f"placement {','.join(chosen)} leaves the last stage unfused; "
            f"add {names[-1]}, where the predictions become one"
        )
    return [name for name in names if name in chosen]


def choices(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """Return the placements of SHOWN that differ for a model, each with its fused stages."""
    found: dict[str, list[str]] = {}
    for name in SHOWN:
        if name != "double" or any(stage.group == "double" for stage in stages):
            fused = fused_stages(name, stages)
            if fused not in found.values():
                found[name] = fused
    return found
