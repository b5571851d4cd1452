"""What an ensemble is made and trained with where the user does not say: every choice, with its reason.

An option that is given always wins, and so does the run that a folder holds already. Everything follows from
the experts' configs and the number of images, so it is known before training: `afa train --dry-run` prints
it, and afa.json records it. *far* is the embedded world of docs/results.md; what was measured there alone
says so, and what lies between two measurements was not measured.
"""

import math

# Measured on far: .943 attributes right, a router .892; sabw .836 on other scenes. On near it was better than
# sabw by .003 of the attributes' probability (docs/results.md, docs/log.md).
AGGREGATOR = "stitch"

NARROWEST, WIDEST = 32, 128  # measured on far, where 64 gained nothing (docs/log.md); the paper's for SD 1.5
PART = 4  # of the channels of the experts' widest stage: the 96 of far's experts give 32, SD 1.5's 1,280 128
HEADS = 4  # measured on far; the paper's 8 heads are 16 wide, and GPUs attend faster with 32
DEPTH = 1  # measured on far; the paper's second layer doubles what attention costs

# Far's maps are 16 wide. Larger ones get attention only where the experts have some, since it costs the
# fourth power of the side: on SDXL's maps of 128, where its experts have none, it made the ensemble 8.7 times
# as slow as one expert instead of 3.2 times (one H200, 1,024 px).
SMALL_SIDE = 32

RATE = 2e-3  # measured on far, with hidden 32; 5e-3 was worse (docs/log.md)

# Measured on near and far: 15 passes over 448 images lower the loss by .7 to 3.4 % over five, and pictures
# do not gain by it (docs/log.md). The paper's 12,500 steps are ten passes over 10,000 images. Training stops
# earlier by itself.
PASSES, LEAST_STEPS, MOST_STEPS = 5, 250, 12_500

# Intervals over fewer images are too narrow: they cover .89 instead of .95 of the truth for 10, .93 for 20
# (docs/metrics.md, by simulation).
FEWEST_HELD_OUT = 20

# Of afa distill (docs/log.md). The rate is for experts that are near each other, whose widest stage has 64
# channels; where their mean is far from all of them, as on far, ten times as much learns faster.
DISTILL_STEPS, DISTILL_EMA, TRAJECTORY_STEPS, CAPTIONS = 1000, 0.99, 12, 4096
DISTILL_RATE, DISTILL_WIDTH = 1e-4, 64
IMAGE_SHARE = 0.0  # a student needs captions alone; on far, images help (docs/log.md)

# Of --reuse: stages at either end of a U-Net that run in all steps.
OUTER_STAGES = 2

# Denoising steps of afa generate; stock pipelines of Stable Diffusion take as many.
GENERATION_STEPS = 50

# Images in a shard of afa generate --pack: some hundred megabytes at 512 pixels.
PACK_SIZE = 1000

WHY = {
    "aggregator": "the best on the embedded world far, and better than sabw on near, docs/results.md",
    "hidden": f"a quarter of the experts' widest stage, from {NARROWEST} to {WIDEST}",
    "heads": "as measured on the embedded world",
    "depth": "as measured on the embedded world; the paper's is 2",
    "attention_up_to": f"maps up to {SMALL_SIDE}, and larger ones where the experts have attention",
    "lr": f"{RATE:g} at hidden {NARROWEST}, lower in proportion for wider aggregators",
    "distill_rate": f"{DISTILL_RATE:g} for models of {DISTILL_WIDTH} channels, lower in proportion for wider",
    "steps": f"{PASSES} passes over the training images, from {LEAST_STEPS} to {MOST_STEPS:,}",
}  # option -> the reason in a clause, for --dry-run


def widths(widest: int, hidden: int | None = None, heads: int | None = None) -> dict[str, int]:
    """Return hidden, heads and depth of the aggregators.

    widest:        channels of the experts' widest stage
    hidden, heads: as given; None: not given
    """
    if hidden is None:
        multiple = heads or NARROWEST
        hidden = min(WIDEST, max(NARROWEST, widest // PART // NARROWEST * NARROWEST))
        hidden = max(1, hidden // multiple) * multiple
    return {"hidden": hidden, "heads": heads or math.gcd(HEADS, hidden), "depth": DEPTH}


def learning_rate(hidden: int | None) -> float:
    """Return the learning rate for aggregators of this width; None: of another kind, without a width.

    Adam moves every weight by about the rate, so what a layer adds grows with its width, and the rate falls
    as the width grows (Yang et al., arXiv:2203.03466, table 3).
    """
    return float(f"{RATE * NARROWEST / (hidden or NARROWEST):.2g}")


def distill_rate(widest: int) -> float:
    """Return the learning rate of a student whose widest stage has so many channels; see learning_rate."""
    return float(f"{DISTILL_RATE * DISTILL_WIDTH / widest:.2g}")


def steps(images: int, images_a_step: int) -> int:
    """Return the number of steps.

    images:        that are trained on
    images_a_step: over all processes
    """
    return min(MOST_STEPS, max(LEAST_STEPS, math.ceil(PASSES * images / images_a_step)))


def few_images(images: int, held_out: int) -> str | None:
    """Return a sentence if too few images are held out to tell what training gains; None otherwise.

    images:   all of them
    held_out: of these, at most a fifth
    """
    if held_out >= FEWEST_HELD_OUT:
        return None
    enough = 5 * FEWEST_HELD_OUT
    more = f"give at least {enough} images" if images < enough else f"raise --held-out to {FEWEST_HELD_OUT}"
    return (
        f"only {held_out} of {images} images are held out, and an interval over fewer than {FEWEST_HELD_OUT} "
        f"is too narrow: whether training gains anything can hardly be told; {more}"
    )
