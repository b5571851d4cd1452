"""Strengths in a part of the picture and of the steps as plain values: of flags, requests and PNGs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.errors import UserError, unknown
from afa.images import open_image
from afa.settings import WEIGHT, check_interval, check_number

if TYPE_CHECKING:
    from afa.denoiser.strengths import Strength

FINEST = 128  # most rows and columns of a mask: the latents of a picture of 1,024 pixels
MOST = 100  # regions of a picture
FORM = "NAME=FACTOR[,start=SHARE][,end=SHARE][,mask=PNG], such as photo=0,end=0.5,mask=left.png"


@dataclass(frozen=True)
class Region:
    """Where and when an expert's weights are multiplied.

    expert:     its name
    strength:   the factor, at least 0 (off); 1 changes nothing
    start, end: shares of the steps, 0 to 1, between which it holds
    mask:       where it holds: {"size": [rows, columns], "counts": runs of 0 and 1 in turn, column by
                column}, the uncompressed run lengths of COCO; None: everywhere
    """

    expert: str
    strength: float
    start: float = 0.0
    end: float = 1.0
    mask: Mapping[str, list[int]] | None = None

    def record(self) -> dict[str, Any]:
        """Return it for the record of an image."""
        return asdict(self)


def parse_region(text: str) -> tuple[Region, str | None]:
    """Read --region: -> the region without its mask, and the mask's path. Raises UserError."""
    head, _, path = text.partition(",mask=")
    first, *more = head.split(",")
    name, _, factor = first.rpartition("=")
    found: dict[str, float] = {}
    for key, _, value in [("strength", "=", factor), *(part.partition("=") for part in more)]:
        try:
            found[key] = float(value)
        except ValueError:
            raise UserError(f"--region {text} is no {FORM}: {value!r} is no number") from None
    if not name or not set(found) <= {"strength", "start", "end"} or (",mask=" in text and not path):
        raise UserError(f"--region {text} is no {FORM}")
    region = Region(name, **found)
    check_number(region.strength, f"--region {name}: the factor is", **WEIGHT)
    check_interval((region.start, region.end), f"--region {name}: start,end")
    return region, path or None


def read_mask(path: str) -> dict[str, list[int]]:
    """Return the mask of a picture: where it is brighter than half. Raises UserError for an all-black one."""
    mask = mask_of(np.asarray(open_image(Path(path)).convert("L")))
    if mask is None:
        raise UserError(f"the mask {path} is black everywhere; paint white where the strength holds")
    return mask


def mask_of(grey: NDArray[np.uint8]) -> dict[str, list[int]] | None:
    """Return where a grey picture (H, W) is brighter than half, on at most FINEST rows; None: nowhere."""
    image = Image.fromarray(grey)
    longest = max(image.size)
    if longest > FINEST:
        width, height = (max(1, round(side * FINEST / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    inside = np.asarray(image) > 127
    if not inside.any():
        return None
    counts = [len(list(run)) for _, run in groupby(inside.T.ravel().tolist())]
    return {"size": list(inside.shape), "counts": [0, *counts] if inside[0, 0] else counts}


def read_region(given: Any, names: Sequence[str]) -> Region:
    """Return a region of plain values, such as those of a PNG. names: of the experts

    Raises UserError for anything else than the fields of Region within their bounds.
    """
    fields = ("expert", "strength", "start", "end", "mask")
    if not isinstance(given, Mapping) or not {"expert", "strength"} <= set(given) <= set(fields):
        raise UserError(f"a region must have expert and strength, and may have {', '.join(fields[2:])}")
    values = {"start": 0.0, "end": 1.0, "mask": None, **given}
    if values["expert"] not in names:
        raise UserError(unknown(str(values["expert"])[:80], names, "expert"))
    check_number(values["strength"], f"the strength of expert '{values['expert']}' is", **WEIGHT)
    check_interval((values["start"], values["end"]), f"the steps of expert '{values['expert']}'")
    numbers = {name: float(values[name]) for name in ("strength", "start", "end")}
    mask = None if values["mask"] is None else _checked(values["mask"])
    return Region(values["expert"], mask=mask, **numbers)


def _checked(mask: Any) -> dict[str, list[int]]:
    """Return a mask of plain values. Raises UserError if its runs do not fill it."""
    size, counts = (mask.get("size"), mask.get("counts")) if isinstance(mask, Mapping) else (None, None)

    def whole(values: Any, least: int, most: int) -> bool:
        return isinstance(values, (list, tuple)) and all(
            isinstance(one, int) and not isinstance(one, bool) and least <= one <= most for one in values
        )

    if not (whole(size, 1, FINEST) and len(size) == 2 and whole(counts, 0, FINEST**2)):
        raise UserError(f"a mask must have a size, [rows, columns] up to {FINEST}, and counts, whole numbers")
    if sum(counts) != size[0] * size[1]:
        raise UserError(
            f"a mask's counts sum to {sum(counts)}, and its size {size[0]} × {size[1]} has "
            f"{size[0] * size[1]} places"
        )
    return {"size": list(size), "counts": list(counts)}


def pixels_of(mask: Mapping[str, list[int]]) -> NDArray[np.bool_]:
    """Return a mask as (rows, columns)."""
    counts, (rows, columns) = mask["counts"], mask["size"]
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.asarray(runs.reshape(columns, rows).T)


def as_strengths(regions: Sequence[Region], steps: int, names: Sequence[str]) -> list["Strength"]:
    """Return regions as scale_weights takes them.

    steps: of the sampling
    names: of the experts
    Raises UserError for a region that holds in none of the steps, too many regions, and if all experts are
    off at a place.
    """
    import torch

    from afa.denoiser.strengths import Strength, check_regions

    if len(regions) > MOST:
        raise UserError(f"{len(regions)} regions are given; give at most {MOST}")
    found = []
    for one in regions:
        mask = None if one.mask is None else torch.tensor(pixels_of(one.mask), dtype=torch.float32)[None]
        found.append(Strength(one.expert, one.strength, mask, one.start, one.end))
        if not any(found[-1].holds(step / steps) for step in range(steps)):
            raise UserError(
                f"the strength of expert '{one.expert}' holds from {one.start:g} to {one.end:g} of the "
                f"steps, where none of {steps} steps begins; give a longer part"
            )
    check_regions(names, found)
    return found
