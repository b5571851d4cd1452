"""The options of a training run. No heavy imports: the command line's help comes from here."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from afa import defaults
from afa.aggregators.registry import explain_trained, trained_kinds
from afa.aggregators.settings import ATTENTION_HELP, AggregatorSettings, with_aggregator_options
from afa.errors import UserError
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.settings import (
    CONFIG_HELP,
    COUNT,
    FRAME_HELP,
    GUIDANCE,
    SAMPLING_STEPS,
    SEED,
    SHARDED,
    SHARE,
    STORE_HELP,
    STORES,
    TEXT_ENCODER_HELP,
    WEIGHT,
    option,
)
from afa.training.objective_settings import ObjectiveSettings

# Once, when an ensemble is made; so are the aggregators' options.
MADE = (
    "aggregator",
    "placement",
    "attention_up_to",
    "text_stream",
    "vae",
    "config",
    "prediction_type",
    "frame",
    "text_encoder",
)


@dataclass(frozen=True, kw_only=True)
class LoopSettings(ObjectiveSettings):
    """The options of all training runs; each field is a flag."""

    free: ClassVar[tuple[str, ...]] = (
        *("recipe", "output", "save_every", "cache", "max_skipped", "log_with"),
        *("gradient_checkpointing", "checkpoint_large_maps"),
        *("sheet_every", "sheet_images", "sheet_steps", "sheet_guidance", "watch", "watch_weights"),
        *("device", "parallel", "dry_run", "json", "allow_outside", "patience"),
    )

    data: str = option(
        help="a folder with metadata.jsonl or with a .txt beside every image, a .jsonl or .csv of paths, "
        ".parquet, .tar shards (x-{000..099}.tar), or a data set of the hub"
    )
    image_column: str | None = option(
        None, help="column of the data with the image or its path (default: image, jpg, file_name …)"
    )
    caption_column: str | None = option(
        None, help="column of the data with the caption (default: text, caption, prompt)"
    )
    allow_outside: bool = option(
        False, help="also read images that the data name outside their own folder: links, absolute paths, .."
    )
    limit: int | None = option(
        None,
        least=1,
        most=10**9,
        help="read only this number of images; a data set of the hub is then streamed instead of downloaded",
    )
    crops: int = option(
        0,
        least=0,
        most=10_000,
        help="number of random square crops of every training image, each encoded once; 0: the centre",
    )
    flip: bool = option(False, help="mirror half of the random crops")
    max_skipped: float = option(
        0.1, **SHARE, help="share of the images that may be unusable before the run stops"
    )
    output: str = option(help="folder of the result; the same command continues an interrupted run there")
    steps: int = option(
        1000,
        least=1,
        most=10**9,
        help="optimiser steps at most; training stops earlier when the held-out loss no longer falls",
    )
    batch_size: int = option(8, **COUNT, help="images per step and process")
    accumulate: int = option(1, **COUNT, help="batches whose gradients make one step")
    lr: float = option(1e-4, **SHARE, help="learning rate of AdamW after the warm-up")
    warm_up: int = option(20, least=0, most=10**9, help="steps over which the learning rate rises from 0")
    schedule: str = option(
        "constant",
        help="schedule of the learning rate after the warm-up; all but constant fall to 0 at --steps",
        choices=["constant", "cosine", "linear"],
    )
    weight_decay: float = option(0.01, **WEIGHT, help="weight decay of AdamW")
    clip: float = option(1.0, above=0, most=10**9, help="largest norm of the gradient")
    ema: float = option(
        0.999,
        **SHARE,
        help="largest decay of the moving average of the trained weights, which is saved; below it the "
        "average is over the last ninth of the steps so far",
    )
    caption_dropout: float = option(
        0.1, **SHARE, help="share of samples trained without their caption, so that guidance keeps working"
    )
    resolution: int | None = option(
        None,
        least=1,
        most=2**16,
        help="side of the squares to which images are cropped, in pixels; with --buckets, of their area "
        "(default: the experts' own)",
    )
    buckets: bool = option(
        False,
        help="cut each image to that of several sizes, of about the square's area, which crops least of it; "
        "all images of a step have one size",
    )
    bucket_step: int | None = option(
        None,
        least=1,
        most=2**16,
        help="for buckets: pixels between their sides (default: 64, less below 512 pixels)",
    )
    bucket_sides: list[int] | None = option(
        None,
        least=1,
        most=2**16,
        help="for buckets: smallest and largest side in pixels (default: half and twice the resolution)",
    )
    cache: str | None = option(
        None,
        help="folder that keeps latents and text states for all runs; "
        "VAE and text encoders then leave the memory",
    )
    held_out: int = option(
        64,
        **COUNT,
        help="number of images that are never trained on, at most a fifth; "
        "training stops early by their loss",
    )
    evaluate_every: int = option(
        50, least=1, most=10**9, help="steps between two measurements on the held-out images"
    )
    patience: int = option(
        10, least=1, most=10**9, help="measurements without a better one before training stops"
    )
    save_every: int = option(
        200, least=1, most=10**9, help="steps between two saved states; Ctrl-C also saves one"
    )
    seed: int = option(0, **SEED, help="seed of all random numbers, 0 to 2**64 - 1")
    dtype: str = option(
        "float32",
        help="number format of frozen weights; trained weights are always float32",
        choices=["float32", "bfloat16"],
    )
    config: str | None = option(None, help=CONFIG_HELP)
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    frame: str | None = option(
        None,
        place=True,
        help=FRAME_HELP,
    )
    text_encoder: list[str] | None = option(None, place=True, help=TEXT_ENCODER_HELP)
    gradient_checkpointing: bool = option(
        False, help="recompute stages in the backward pass: less memory, a third more time"
    )
    checkpoint_large_maps: bool = option(
        False,
        help="recompute only the stages on the largest maps: half of the memory, for little more time; with "
        "transformers, whose maps are all alike, all stages",
    )
    sheet_every: int | None = option(
        None,
        least=1,
        most=10**9,
        help="steps between two sample sheets with weight maps, a multiple of --evaluate-every "
        "(default: no sheets)",
    )
    sheet_images: int = option(4, **COUNT, help="number of held-out captions on a sheet")
    sheet_steps: int = option(20, **SAMPLING_STEPS, help="sampling steps of a sheet")
    sheet_guidance: float | None = option(
        None, **GUIDANCE, help="strength of guidance of a sheet (default: the family's own)"
    )
    watch: str | None = option(
        None, help="a metric of the sheets' images that is not trained on; it shows if the reward is hacked"
    )
    watch_weights: str | None = option(None, help="where that metric's weights are (default: the hub)")
    log_with: str | None = option(
        None,
        help="a tracker that gets the log too, besides the terminal and log.jsonl",
        choices=["tensorboard", "trackio", "wandb"],
    )
    device: str | None = option(
        None,
        help="device to train on (default: the best one); accelerate launch uses several",
        choices=["cpu", "cuda", "mps", "xpu"],
    )
    dry_run: bool = option(False, help="print what would be trained and what it costs, then stop")
    json: bool = option(False, help="print the result as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_checkpointing and self.checkpoint_large_maps:
            raise UserError(
                "--gradient-checkpointing recomputes all stages, and --checkpoint-large-maps some of them; "
                "give one of them"
            )
        if self.watch is not None and self.sheet_every is None:
            raise UserError(f"--watch {self.watch} judges sheets; give --sheet-every {self.evaluate_every}")
        if self.sheet_every is not None and self.sheet_every % self.evaluate_every:
            raise UserError(
                f"--sheet-every {self.sheet_every} must be a multiple of --evaluate-every "
                f"{self.evaluate_every}"
            )
        if self.flip and not self.crops:
            raise UserError("--flip mirrors random crops, and there are none; give --crops 1 or more")
        self._check_buckets()

    def _check_buckets(self) -> None:
        """Raise UserError for options of buckets where there are none, and for sides that are no pair."""
        sides = self.bucket_sides
        shown = None if sides is None else " ".join(map(str, sides))
        for flag, value in (("--bucket-step", self.bucket_step), ("--bucket-sides", shown)):
            if value is not None and not self.buckets:
                raise UserError(
                    f"{flag} {value} is of buckets, and images are cut to squares; give --buckets too"
                )
        if sides is not None and len(sides) != 2:
            raise UserError(
                f"--bucket-sides {shown} is no pair; give the smallest and the largest side, e.g. 256 1024"
            )

    def binding(self) -> dict[str, object]:
        """Return the options that must stay the same when a run resumes; of a constant rate not the steps."""
        bound = super().binding()
        return {name: bound[name] for name in bound if name != "steps" or self.schedule != "constant"}

    @property
    def folder(self) -> Path:
        """Where the run keeps its state, log and record."""
        return Path(self.output)

    def files(self) -> dict[str, str]:
        """Return sha256 of the run's files, which must stay the same when it resumes."""
        raise NotImplementedError

    def judges(self) -> dict[str, str]:
        """Return the reward's file and weights, if they are local."""
        given = {"reward": self.reward, "reward weights": self.reward_weights}
        return {name: place for name, place in given.items() if place is not None and Path(place).exists()}

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0. Warm-up is linear from lr / warm_up to lr."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        part = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        factors = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}
        return self.lr * factors[self.schedule]

    def set_checkpointing(self, denoiser: Any) -> None:
        """Have a drop-in denoiser recompute the stages that these settings ask for."""
        if self.gradient_checkpointing or self.checkpoint_large_maps:
            denoiser.enable_gradient_checkpointing(largest_maps_only=self.checkpoint_large_maps)


@with_aggregator_options
@dataclass(frozen=True, kw_only=True)
class TrainSettings(LoopSettings, AggregatorSettings):
    """The options of `afa train`; each field is a flag. The aggregators' options are fields too."""

    trained_only: ClassVar[bool] = True
    recipe: str | None = option(
        None,
        also="--preset",
        help="paper (the published form), paper-sd15, paper-sdxl, low-memory, scenes, or a .toml file of "
        "flags; a flag on the command line replaces the value of the recipe",
    )
    experts: list[str] | None = option(
        None,
        place=True,
        help="the experts: diffusers folder, .safetensors file or org/name@revision, each optionally NAME=…",
    )
    start: str | None = option(
        None,
        place=True,
        ensemble=True,
        help="a saved ensemble to train further, instead of --experts",
    )
    # A step's options, or None until they are chosen by afa.defaults: see chosen().
    steps: int = option(
        None,
        least=1,
        most=10**9,
        help="optimiser steps at most; training stops earlier when the held-out loss no longer falls "
        f"(default: {defaults.WHY['steps']})",
    )
    lr: float = option(
        None, **SHARE, help=f"learning rate of AdamW after the warm-up (default: {defaults.WHY['lr']})"
    )
    aggregator: str | None = option(
        None,
        help=explain_trained(),
        choices=trained_kinds,
    )
    placement: str | None = option(
        None,
        help="fused stages: layers (all), blocks, every-K, double (FLUX), "
        "out (a router on the predictions), or names such as M00,OUT11 (default: the family's)",
    )
    attention_up_to: int | None = option(
        None,
        least=0,
        most=2**16,
        help=ATTENTION_HELP,
    )
    text_stream: str = option(
        "own",
        help="SD3, FLUX, Qwen-Image: each expert keeps its own text tokens, or they are fused "
        "as image tokens are",
        choices=["own", "fused"],
    )
    vae: str | None = option(
        None,
        place=True,
        help="an expert's name, a VAE's or pipeline's folder, or one .safetensors file (default: "
        "the first expert's)",
    )
    store: str | None = option(
        None,
        help=f"{STORE_HELP}; or sharded: each process of a machine keeps a part of them (torchrun)",
        choices=[*STORES, SHARDED],
    )
    parallel: str | None = option(
        None,
        help="experts: the processes of torchrun share the experts, one device each, and not the images",
        choices=["experts"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.experts is None) == (self.start is None):
            raise UserError("give either --experts A B …, or --start ENSEMBLE")
        if self.experts is not None and len(self.experts) < 2:
            alone = f"only {self.experts[0]}" if self.experts else "none"
            raise UserError(
                f"--experts names {alone}; an ensemble needs at least two experts (to train one alone: "
                "afa finetune)"
            )
        made = [name for name, default in self._made().items() if getattr(self, name) != default]
        if self.start is not None and made:
            flag = f"--{made[0].replace('_', '-')} {getattr(self, made[0])}"
            raise UserError(
                f"{flag} cannot be given with --start {self.start}: "
                "its aggregators and its frame are made already"
            )
        self.aggregator_options()  # raises for an option that the aggregator does not have
        if self.store == SHARDED and self.sheet_every is not None:
            raise UserError(
                f"--sheet-every {self.sheet_every} draws in one process, and --store sharded needs all of "
                "them; leave out one of them"
            )
        for name in ("store", "sheet_every"):
            if self.parallel is not None and getattr(self, name) is not None:
                raise UserError(
                    f"--parallel {self.parallel} is for whole experts and without sheets, "
                    f"and --{name.replace('_', '-')} {getattr(self, name)} is given; leave out one of them"
                )

    def files(self) -> dict[str, str]:
        """Return sha256 of experts, frame and rewards, or of a saved ensemble and its parts."""
        from afa.fingerprint import fingerprint, saved_fingerprint

        if self.start is not None:
            return saved_fingerprint(Path(self.start)) | fingerprint(**self.judges())
        lent = {"vae": self.vae, "frame": self.frame, "text_encoder": self.text_encoder}
        return fingerprint(self.experts or (), config=self.config, **lent, **self.judges())

    def further(self, start: Path | str, **changes: Any) -> "TrainSettings":
        """Return settings of a run that continues training a saved ensemble."""
        return replace(
            self, **{**self._made(), "experts": None, "recipe": None, "start": str(start), **changes}
        )

    def _made(self) -> dict[str, Any]:
        """Return the options that are chosen once, when an ensemble is made, with their defaults."""
        names = (*MADE, *self.option_fields())
        return {field.name: field.default for field in fields(self) if field.name in names}
