"""The settings of `afa screen`. This module imports no torch, so that --help is fast."""

from dataclasses import dataclass
from typing import ClassVar

from afa.errors import UserError
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.settings import (
    CONFIG_HELP,
    COUNT,
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    FRAME_HELP,
    GUIDANCE,
    SAMPLING_STEPS,
    SEED,
    TEXT_ENCODER_HELP,
    CheckedOptions,
    option,
)


@dataclass(frozen=True)
class ScreenSettings(CheckedOptions):
    """The settings of one screening; each field is a flag of `afa screen`."""

    free: ClassVar[tuple[str, ...]] = ("output", "batch_size", "allow_outside", "device", "dry_run", "json")

    experts: list[str] = option(
        positional=True,
        place=True,
        help="two or more: a diffusers folder, .safetensors file of original layout or org/name@revision,"
        " each optionally NAME=… and …+LORA",
    )
    data: str | None = option(
        None,
        help="captioned images: a folder with metadata.jsonl or with a .txt beside every image, a .jsonl,"
        " parquet files, tar shards or a data set of the hub",
    )
    prompts: str | None = option(
        None,
        help="instead of --data, a file of prompts; the experts' images show where they disagree,"
        " not which expert is right",
    )
    output: str | None = option(
        None,
        help="a folder for report.html and screen.json; an interrupted screening resumes in it"
        " (default: nothing is kept)",
    )
    base: str | None = option(
        None,
        place=True,
        help="the model that the experts were fine-tuned from; finds an expert that equals this base",
    )
    images: int = option(64, least=2, most=10**6, help="use this many images or prompts, the first ones")
    draws: int = option(
        4,
        least=2,
        most=1000,
        help=(
            "noises for every image and timestep; for the head-room, the others predict which expert is best"
            " for one"
        ),
    )
    seed: int = option(0, **SEED, help="seed of timesteps and noise, 0 to 2**64 - 1")
    resolution: int | None = option(
        None,
        least=1,
        most=2**16,
        help="side of the square that is cut from images, in pixels (default: the experts' own)",
    )
    image_column: str | None = option(
        None, help="column of --data with the images (default: image, jpg, file_name …)"
    )
    caption_column: str | None = option(
        None, help="column of --data with the captions (default: text, caption, prompt …)"
    )
    allow_outside: bool = option(
        False, help="also read images that --data names outside its own folder: links, absolute paths, .."
    )
    max_skipped: float = option(0.1, least=0, below=1, help="share of images that may be unreadable")
    no_average: bool = option(
        False,
        help="do not screen the weight average of all experts, which needs the disk space of one expert",
    )
    steps: int = option(20, **SAMPLING_STEPS, help="with --prompts: denoising steps")
    guidance: float | None = option(
        None, **GUIDANCE, help="with --prompts: strength of guidance (default: the family's own)"
    )
    config: str | None = option(None, help=CONFIG_HELP)
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    frame: str | None = option(
        None,
        place=True,
        help=FRAME_HELP,
    )
    text_encoder: list[str] | None = option(None, place=True, help=TEXT_ENCODER_HELP)
    vae: str | None = option(
        None,
        place=True,
        help="a VAE's or pipeline's folder, or one .safetensors file (default: the first expert's)",
    )
    batch_size: int = option(
        16, **COUNT, help="noisy latents in one pass of a denoiser; never more than one image has"
    )
    dtype: str = option("float32", help=DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
    dry_run: bool = option(False, help="print how many passes and how much disk it would take, then stop")
    json: bool = option(False, help="print everything as one JSON document")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.experts) < 2:
            raise UserError(
                f"screening compares experts, and {len(self.experts)} is given ({' '.join(self.experts)});"
                " give at least two"
            )
        if (self.data is None) == (self.prompts is None):
            raise UserError("give either --data, captioned images, or --prompts, a file of prompts")
        self._check_prompts_only()

    def _check_prompts_only(self) -> None:
        """Raise UserError for options of --prompts with --data, and the reverse."""
        if self.data is not None and (self.guidance is not None or self.steps != 20):
            raise UserError(
                "--steps and --guidance are for --prompts, where experts draw;"
                " with --data nothing is drawn, so leave them out"
            )
        for name in ("image_column", "caption_column", "allow_outside"):
            if self.prompts is not None and getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is for --data; leave it out with --prompts")
