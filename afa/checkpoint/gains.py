"""What a training gained, in sentences: for the end of `afa train`, and for the model card."""

import math
from collections.abc import Mapping
from typing import Any

from afa.stats import Estimate, least_items

HARDLY = 0.01  # of the weight of all experts, which is 1: a mean change below this is hardly any routing
MOST = 10**6  # held-out images: a gain that needs more is not worth a number

# keys of a record -> what stands there
BEFORE = {
    "difference_to_untrained": "the untrained ensemble",
    "difference_to_untrained_mean": "the untrained ensemble",
    "difference_to_start": "the ensemble it was begun with",
}


def gains(record: Mapping[str, Any]) -> list[str]:
    """Return what training gained over the best expert and over the ensemble before training.

    An ensemble often has most of its gain before it is trained, so both are shown. Where little was learnt,
    the sentences say so, and what to try.

    record: of the training, as in the manifest
    """
    best = Estimate(**record["difference_to_best_expert"])
    figures = best.words(5, signed=True)
    against = f"that of its best expert, {record['best_expert']}: {figures}"
    paired = f"paired over the held-out images{best.too_few('image')}."
    key = next((key for key in BEFORE if key in record), None)
    if key is None:  # of a record from before both were compared
        return [f"The trained ensemble's loss is {best.verdict} {against}, {paired}"]
    change = Estimate(**record[key])
    second = change.verdict.rpartition(" ")[2] if best.verdict == change.verdict else best.verdict
    own = f"{change.verdict} that of {BEFORE[key]}: {change.words(5, signed=True)}"
    return [
        f"The trained ensemble's loss is {own}, and {second} {against}, {paired}",
        *_share(change, best),
        *_little(record, change),
    ]


def _share(change: Estimate, best: Estimate) -> list[str]:
    """Return how much of the gain over the best expert was there before training; [] without such a gain.

    change: the trained loss minus that before training
    best:   the trained loss minus that of the best expert
    """
    if best.verdict != "lower than":
        return []
    share = round(100 * (best.value - change.value) / best.value)  # of the gain, in percent
    part = "None" if share < 1 else "All" if share > 99 else f"{share} %"
    return [f"{part} of the gain over the best expert was there before training."]


def _little(record: Mapping[str, Any], change: Estimate) -> list[str]:
    """Return what is said where the experts' weights have hardly moved, or nothing was gained.

    change: the trained loss minus that before training
    """
    found, moved = [], record.get("weights_moved")
    still = moved is not None and moved < HARDLY
    if still:
        found.append(
            f"The experts' weights have hardly moved: by {moved:.4f} in the mean over stages and held-out "
            f"images, where {HARDLY:g} would be a little."
        )
    if change.verdict == "higher than":
        found.append("Training made it worse.")
    elif change.verdict != "lower than":
        found.append(
            "No measurement was better than before training, so the weights from before were kept."
            if record["best_step"] == 0
            else f"What training gained is within noise{_needed(change)}."
        )
    return [*found, _to_try(record, still, change)] if found else []


def _needed(change: Estimate) -> str:
    """Return how many held-out images so small a gain would need, as a clause; empty without a gain."""
    if change.value >= 0 or not change.has_interval or change.n < least_items():
        return ""
    half = (change.high - change.low) / 2
    count = change.n * (half / change.value) ** 2  # intervals shrink by the square root of n
    if not change.n < count < MOST:
        return ""
    digits = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return f"; to tell so small a gain takes about {math.ceil(count / digits) * digits:,} held-out images"


def _to_try(record: Mapping[str, Any], still: bool, change: Estimate) -> str:
    """Return what the user can do. still: whether the weights have hardly moved."""
    settings = record.get("settings", {})
    lr = f" (now {settings['lr']:g})" if isinstance(settings.get("lr"), float) else ""
    steps = f"more steps (--steps {2 * max(1, record['steps'])})"
    if still:
        options = f"{steps} or a higher --lr{lr}"
    elif change.verdict == "higher than" or record["best_step"] == 0:
        options = f"a lower --lr{lr}"
    elif record["best_step"] < record["steps"]:  # the loss had stopped falling
        options = "more images"
    else:
        options = steps
    return f"Try {options}; `afa screen` with these experts and images says what there is to gain."
