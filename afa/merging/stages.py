"""Which stage of a denoiser each of its parameters belongs to, from the names alone: diffusers' or the original ones.

The rule is that of block-weighted merging (bbc-mc, sdweb-merge-block-weighted-gui), and the stages are those of
afa.families: what runs before the first stage (time embedding, added conditions) belongs to the first, what runs after
the last (output norm and convolution) to the last. Everything that is not the denoiser is `base`.
"""

import re
from collections.abc import Iterable

BASE = "base"
PLACE = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
ORIGINAL = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.")
TRANSFORMER = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.")
LAST = ("conv_norm_out.", "conv_out.", "out.", "norm_out.", "proj_out.")  # what runs after the last stage


def stages_of(names: Iterable[str]) -> dict[str, str]:
    """The stage of every parameter of one denoiser: name -> stage.

    names: all of the denoiser's own names, without a prefix: of a U-Net (diffusers or original layout), or of a
    diffusers transformer (SD3: block.N; FLUX: block.N for double and single.N for single blocks).
    Raises ValueError if they are none of these.
    """
    names = list(names)
    if any(PLACE.match(name) for name in names):
        return _diffusers_unet(names)
    for pattern, stage in ((ORIGINAL, _original_stage), (TRANSFORMER, _transformer_stage)):
        found = {name: stage(match[1], int(match[2])) for name in names if (match := pattern.match(name))}
        if found:
            return _with_ends(names, found)
    raise ValueError(
        f"names such as '{names[0] if names else ''}' are those of no denoiser that is known here (U-Net, SD3, FLUX)"
    )


def stage_names(names: Iterable[str]) -> tuple[str, ...]:
    """A denoiser's stages in the order they run: IN00 …, M00, OUT00 …; or block.0 …, single.0 …"""
    return _ordered(stages_of(names).values())


def _ordered(stages: Iterable[str]) -> tuple[str, ...]:
    kinds = ("IN", "M", "OUT", "block.", "single.")
    parts = [(stage.rstrip("0123456789"), stage) for stage in set(stages)]
    ordered = sorted(parts, key=lambda part: (kinds.index(part[0]), int(part[1].removeprefix(part[0]))))
    return tuple(stage for _, stage in ordered)


def _diffusers_unet(names: list[str]) -> dict[str, str]:
    """A U-Net's blocks hold different numbers of layers; count them to number the stages through."""
    places = {name: (match[1], int(match[2]), match[3], int(match[4])) for name in names if (match := PLACE.match(name))}
    layers = {place for place in places.values() if place[2] == "resnets"}
    downsampled = {block for side, block, kind, _ in places.values() if kind == "downsamplers"}

    def stage(side: str, block: int, kind: str, layer: int) -> str:
        earlier = sum(1 for other in layers if other[0] == side and other[1] < block)
        inside = sum(1 for other in layers if other[:2] == (side, block)) if kind in ("downsamplers", "upsamplers") else layer
        if side == "up_blocks":
            return f"OUT{earlier + inside - (kind == 'upsamplers'):02}"
        return f"IN{1 + earlier + sum(1 for other in downsampled if other < block) + inside:02}"

    found = {name: stage(*place) for name, place in places.items()}
    return _with_ends(names, {**found, **{name: "M00" for name in names if name.startswith("mid_block.")}}, first="IN00")


def _with_ends(names: list[str], found: dict[str, str], first: str | None = None) -> dict[str, str]:
    """Give what no stage claims to the first stage, or to the last if it runs after it."""
    found = {**found, **{name: "M00" for name in names if name.startswith("middle_block.")}}
    ordered = _ordered(found.values())
    return {name: found.get(name) or (ordered[-1] if name.startswith(LAST) else first or ordered[0]) for name in names}


def _original_stage(side: str, number: int) -> str:
    return f"{'IN' if side == 'input_blocks' else 'OUT'}{number:02}"


def _transformer_stage(kind: str, number: int) -> str:
    return f"{'single' if kind.startswith('single') else 'block'}.{number}"
