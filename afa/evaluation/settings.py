"""The options of a comparison. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass
from typing import ClassVar

from afa.errors import UserError, unknown
from afa.settings import (
    COUNT,
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    GUIDANCE,
    MOVED_HELP,
    SAMPLING_STEPS,
    SEED,
    SIDE,
    CheckedOptions,
    option,
)

STUDIES = ["experts", "ablations", "objectives"]
AXES = ("guidance", "steps")  # settings of sampling that may have several values


@dataclass(frozen=True)
class EvaluateSettings(CheckedOptions):
    """The options of `afa evaluate`; each field is a flag.

    Several values of guidance or steps are kept in ascending order; a list of one is that value.
    """

    free: ClassVar[tuple[str, ...]] = (
        *("output", "methods", "seeds", "metrics", "metric_weights", "scorer", "study", "curves"),
        *("batch_size", "device", "resamples", "allow_outside", "dry_run", "json"),
    )

    ensemble: str = option(place=True, ensemble=True, help="a saved ensemble, made by `afa train`")
    output: str = option(
        help=(
            "a folder for images, scores and results.json; what is already there and was made the same way"
            " is kept"
        )
    )
    protocol: str = option(
        help="scenes, coco2017, drawbench, a file of prompts, or a folder of captioned images"
    )
    experts: list[str] | None = option(None, place=True, help=MOVED_HELP)
    methods: list[str] = option(
        ["all"], help="what to compare: all, or names (`afa evaluate --methods list` shows them)"
    )
    seeds: int = option(
        1,
        least=1,
        most=1000,
        help="training seeds of everything that is trained; the ensemble itself is the first",
    )
    train_data: str | None = option(
        None,
        help="where the captioned training images are (default: "
        "scenes:N if the ensemble was trained on that, else the protocol's own; "
        "no other place is taken from afa.json)",
    )
    base: str | None = option(
        None,
        place=True,
        help="the model the experts were fine-tuned from; task arithmetic, TIES, "
        "DARE, model stock and LoRAtorio need it",
    )
    metrics: list[str] | None = option(
        None, help="the metrics; the first one is the main one of the table (default: the protocol's)"
    )
    metric_weights: list[str] | None = option(
        None, help="where a metric's weights are, each METRIC=PATH or METRIC=org/name"
    )
    scorer: str | None = option(
        None,
        help="a Python file: score(images, captions) -> dict of n numbers each, "
        "and perhaps features(images); images: (n, H, W, 3) uint8",
    )
    study: list[str] | None = option(
        None,
        help="also: experts (how many), ablations (placement, depth …), objectives",
    )
    reward: str | None = option(
        None, help="reward for the study of objectives, as in `afa train` (default: the protocol's)"
    )
    reward_weights: str | None = option(None, help="where that reward's weights are (default: the hub)")
    prompts: int | None = option(
        None,
        least=2,
        most=10**6,
        help="use this many prompts, the first ones (default: all of the protocol's)",
    )
    images_per_prompt: int | None = option(
        None, **COUNT, help="images of each prompt (default: the protocol's)"
    )
    seed: int = option(
        0,
        **SEED,
        help="seed of the first image's noise, 0 to 2**64 - 1; image k has seed + k, for every method",
    )
    steps: list[int] | int | None = option(
        None, **SAMPLING_STEPS, help="denoising steps (default: the protocol's); several: as for --guidance"
    )
    guidance: list[float] | float | None = option(
        None,
        **GUIDANCE,
        help="strength of guidance (default: the protocol's, or the family's own); several values: each"
        " method is judged at its own, chosen on captions that are not judged, and those of --curves also at"
        " all others, which gives a curve of image quality against distance to real images",
    )
    curves: list[str] | None = option(
        None,
        help="with several --guidance or --steps: methods drawn at every value (default: afa, the router, and"
        " by the tuning captions the best expert, merge, sampling-time method and LoRA control)",
    )
    true_guidance: float | None = option(
        None, **GUIDANCE, help="FLUX: strength of classifier-free guidance beside the built-in one"
    )
    scheduler: str | None = option(
        None, help="ddim, euler, dpm++ …; for flow models: euler, dpm++, unipc (default: the ensemble's)"
    )
    width: int | None = option(
        None, **SIDE, help="width of the images in pixels (default: the protocol's, or the experts' own)"
    )
    height: int | None = option(
        None, **SIDE, help="height of the images in pixels (default: the protocol's, or the experts' own)"
    )
    allow_outside: bool = option(
        False, help="also read images that --protocol or --train-data name outside their own folder"
    )
    protocol_data: str | None = option(None, help="COCO's folder, or DrawBench's table")
    tuning: int = option(
        24,
        least=0,
        most=10**6,
        help="images on which the options of methods are chosen; they are not judged; 0: use the defaults",
    )
    search_trials: int = option(60, least=0, most=10**6, help="merges that auto_mbw tries")
    distill_steps: int | None = option(
        None, **COUNT, help="training steps of distilled models (default: twice as many as the ensemble's)"
    )
    batch_size: int = option(8, **COUNT, help="images made at once")
    resamples: int = option(1000, least=100, most=10**6, help="bootstrap resamples of distances between sets")
    dtype: str = option("float32", help=DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
    dry_run: bool = option(False, help="print what would be done, then stop")
    json: bool = option(False, help="print the results as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in AXES:
            values = getattr(self, name)
            if isinstance(values, (list, tuple)):
                distinct = sorted({float(value) if name == "guidance" else value for value in values})
                object.__setattr__(self, name, distinct[0] if len(distinct) == 1 else distinct or None)
        for name in self.study or []:
            if name == "steps":
                raise UserError("--study steps is --steps 10 20 30 50 now; give any numbers of steps")
            if name not in STUDIES:
                raise UserError(f"--study: {unknown(name, STUDIES, 'study')}")

        if self.curves is not None and not any(map(self.several, AXES)):
            raise UserError("--curves are over several values of --guidance or --steps; give some")

    def several(self, name: str) -> list[float]:
        """Return the values of one of AXES if there are several, else none."""
        values = getattr(self, name)
        return list(values) if isinstance(values, list) else []
