"""Aspect-ratio buckets: images are cut to sizes of about equal area, each to the one that crops least of it.

Sizes as in kohya's scripts, after NovelAI. Deviations: an image gets the bucket of the nearest ratio, not of
the nearest width for a height, so that portrait and landscape are treated alike; and the sides follow the
resolution where the user gives none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from afa.data.images import UNREADABLE, of_each
from afa.data.sources import Sample
from afa.errors import UserError
from afa.images import picture_size

STEP = 64  # pixels, at most: what kohya's scripts take, and SDXL was trained with
PARTS = 8  # of the resolution; a step is no larger, so that small models have several buckets too

Size = tuple[int, int]  # height and width in pixels


def bucket_sizes(resolution: int, step: int, least: int, most: int) -> list[Size]:
    """Return the buckets: sides in steps, and the largest area that is not above the square's.

    resolution: side of the square in pixels, which is a bucket too
    step:       sides are multiples of it
    least, most: smallest and largest side in pixels
    """
    area, found = resolution**2, {(resolution, resolution)}
    for width in range(-(-least // step) * step, most + 1, step):
        height = min(most, area // width) // step * step
        if height >= least:
            found |= {(height, width), (width, height)}
    return sorted(found)


def bucket_for(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the bucket that crops least of an image of some size; of equal ones the largest."""

    def rank(bucket: Size) -> tuple[float, int]:
        return cropped(size, bucket), -bucket[0] * bucket[1]

    return min(sizes, key=rank)


def cropped(size: Size, bucket: Size) -> float:
    """Return the share of an image's pixels that is cropped when it just covers a bucket."""
    one, other = size[0] * bucket[1], size[1] * bucket[0]
    return 1 - min(one, other) / max(one, other)


@dataclass(frozen=True)
class Buckets:
    """The bucket of every image of a data set.

    resolution: side of the square in pixels, the bucket of images that cannot be read
    originals:  size of each image; None for an image that cannot be read
    sizes:      of the buckets
    """

    resolution: int
    originals: tuple[Size | None, ...]
    sizes: tuple[Size, ...]

    @cached_property
    def chosen(self) -> list[Size]:
        """The bucket of each image."""
        square = (self.resolution, self.resolution)
        return [square if size is None else bucket_for(size, self.sizes) for size in self.originals]

    def facts(self) -> dict[str, Any]:
        """Return how many images each bucket has, and what happens to their pixels."""
        read = [(size, bucket) for size, bucket in zip(self.originals, self.chosen, strict=True) if size]
        square = (self.resolution, self.resolution)
        shares = [[cropped(size, bucket), cropped(size, square)] for size, bucket in read] or [[0.0, 0.0]]
        here, there = (sum(column) / len(shares) for column in zip(*shares, strict=True))
        counts = Counter(bucket for _, bucket in read)
        return {
            "images": [
                {"width": width, "height": height, "images": counts[height, width]}
                for height, width in sorted(counts, key=lambda bucket: bucket[1] / bucket[0])
            ],
            "cropped": round(here, 4),
            "cropped_by_squares": round(there, 4),
            "enlarged": sum(size[0] < bucket[0] or size[1] < bucket[1] for size, bucket in read),
        }


def plan_lines(plan: Mapping[str, Any], width: int) -> list[str]:
    """Return the lines about buckets of a run's plan; none without buckets.

    plan:  its facts; buckets with fewer images than a step has are marked
    width: of the first column, which names them
    """
    facts, images_a_step = plan["buckets"], plan["images_a_step"]
    if facts is None:
        return []
    each = [
        f"{one['width']} × {one['height']} ({one['images']}{'*' if one['images'] < images_a_step else ''})"
        for one in facts["images"]
    ]
    rows = [", ".join(each[start : start + 5]) for start in range(0, len(each), 5)]
    lines = [row + ("," if row is not rows[-1] else "") for row in rows]
    lines.append(
        f"{100 * facts['cropped']:.1f} % of the pixels are cropped, by squares "
        f"{100 * facts['cropped_by_squares']:.1f} %; {facts['enlarged']} images are enlarged"
    )
    if any(one["images"] < images_a_step for one in facts["images"]):
        lines.append(
            f"* fewer images than a step has ({images_a_step}): it takes some of them more than once"
        )
    return [f"{'' if place else 'buckets':<{width}}{line}" for place, line in enumerate(lines)]


def find_buckets(samples: Sequence[Sample], resolution: int, sizes: Sequence[Size]) -> Buckets:
    """Read the size of every image, from its header where it has a file of its own."""
    return Buckets(resolution, tuple(of_each(samples, _size_of, "reading sizes")), tuple(sizes))


def _size_of(sample: Sample) -> Size | None:
    """Return an image's size; None if it cannot be read, which the encoder reports."""
    try:
        return picture_size(sample.file or sample.read(), sample.name)
    except UNREADABLE:
        return None


def make_sizes(
    resolution: int, multiple: int, step: int | None = None, sides: Sequence[int] | None = None
) -> list[Size]:
    """Return the buckets of a run.

    resolution: side of the square in pixels
    multiple:   what all sides must be a multiple of
    step:       --bucket-step; None: STEP, less at small resolutions
    sides:      --bucket-sides; None: half and twice the resolution
    Raises UserError for a step that is no such multiple, and for sides without the resolution between them.
    """
    if step is None:
        step = -(-min(STEP, resolution // PARTS) // multiple) * multiple
    if step % multiple:
        near = -(-step // multiple) * multiple
        raise UserError(f"--bucket-step {step} is not a multiple of {multiple} pixels; {near} is the next")
    least, most = sides or (resolution // 2, 2 * resolution)
    if not least <= resolution <= most:
        raise UserError(
            f"--bucket-sides {least} {most} must have --resolution {resolution} between them, "
            f"for example: --bucket-sides {resolution // 2} {2 * resolution}"
        )
    return bucket_sizes(resolution, step, least, most)
