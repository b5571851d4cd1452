"""The options of a calibration of speed. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass
from typing import ClassVar

from afa.defaults import GENERATION_STEPS
from afa.errors import UserError
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


@dataclass(frozen=True)
class CalibrateSettings(CheckedOptions):
    """One calibration, field by field a flag of `afa calibrate`."""

    free: ClassVar[tuple[str, ...]] = tuple("margin metric_weights batch_size device dry_run json".split())

    ensemble: str = option(
        place=True, help="folder of a saved ensemble; the levels are kept in it", positional=True
    )
    prompts: str | None = option(None, help='a file of prompts: one in each line, or JSON lines with "text"')
    prompt: list[str] | None = option(None, help="several prompts")
    images: int = option(64, **COUNT, help="images drawn in every way, always of the same prompts and noise")
    metric: str = option(
        "imagereward",
        help="metric that decides, one that scores every image (list: afa evaluate --metrics list)",
    )
    metric_weights: str | None = option(None, help="weights of the metric: a path or org/name")
    scorer: str | None = option(
        None,
        help="instead of a metric: a Python file with score(images, captions), images (n, H, W, 3) uint8, "
        "that returns a dict of n values each; the first entry counts",
    )
    margin: float | None = option(
        None,
        above=0,
        help="how much lower the score of level balanced may be, for certain (fast: three times as much; "
        "default: a tenth of the standard deviation of the exact ensemble's scores)",
    )
    lead: str | None = option(
        None, help="the expert that may run alone between whole steps (default: the best one in training)"
    )
    steps: int = option(GENERATION_STEPS, **SAMPLING_STEPS, help="denoising steps of the exact ensemble")
    guidance: float | None = option(None, **GUIDANCE, help="strength of guidance (default: the family's own)")
    scheduler: str | None = option(None, help="as in afa generate (default: the ensemble's own)")
    width: int | None = option(None, **SIDE, help="width of the images in pixels (default: the experts' own)")
    height: int | None = option(
        None, **SIDE, help="height of the images in pixels (default: the experts' own)"
    )
    seed: int = option(0, **SEED, help="seed of the noise, 0 to 2**64 - 1")
    batch_size: int = option(4, **COUNT, help="images made at once")
    experts: list[str] | None = option(None, place=True, help=MOVED_HELP)
    dtype: str = option("float32", help=DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
    dry_run: bool = option(False, help="print the ways that may be tried and their prices, then stop")
    json: bool = option(False, help="print the result as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT... or --prompts FILE")
