"""The options of `afa distill`. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass
from pathlib import Path

from afa import defaults
from afa.errors import UserError
from afa.sampling.registry import read_options, teaching_methods
from afa.settings import DTYPES, GUIDANCE, SAMPLING_STEPS, SHARE, STORE_HELP, STORES, option
from afa.training.objective_registry import PLAIN
from afa.training.settings import LoopSettings

WEIGHTED = "weighted"
CAPTIONS = ".txt"
# Options of training on images, without meaning where samplings alone give the latents.
OF_IMAGES = (
    "caption_dropout",
    "timesteps",
    "timestep_range",
    "crops",
    "flip",
    "buckets",
)


@dataclass(frozen=True, kw_only=True)
class DistillSettings(LoopSettings):
    """The options of `afa distill`; each field is a flag."""

    ensemble: str = option(
        place=True,
        ensemble=True,
        help="a saved ensemble, the teacher: its folder, or org/name@revision",
        positional=True,
    )
    data: str = option(
        help="captions: a .txt file with one in each line; or images as afa train takes them, of which the "
        "captions are used"
    )
    output: str = option(
        help="a folder, which becomes a diffusers pipeline (with --lora: diffusers' file of a LoRA); or "
        "FILE.safetensors in the layout that other programs read, with the run's own files in FILE.distill"
    )
    method: str | None = option(
        None,
        choices=teaching_methods,
        help="a sampling-time method that teaches in place of the ensemble's aggregators, with its experts "
        "(single_in_ensemble: one expert)",
    )
    method_option: list[str] | None = option(
        None, help="options of the method, each KEY=VALUE; a list has commas between its values"
    )
    student: str = option(
        WEIGHTED,
        place=True,
        help="what is trained: weighted (the mean of the experts), the name of an expert, or another model "
        "of their architecture",
    )
    lora: int | None = option(
        None, least=1, most=2**20, help="rank of a LoRA, trained in place of all weights of the student"
    )
    recombine: int = option(
        defaults.CAPTIONS,
        least=0,
        most=10**7,
        help="train on at least so many captions: those that are missing are put together from two given "
        "ones at a word that both have (0: the given ones alone)",
    )
    image_share: float = option(
        defaults.IMAGE_SHARE,
        **SHARE,
        help="share of each batch that is noised images of --data, which the images themselves answer, as in "
        "training without a teacher (0: samplings alone; 1: images alone)",
    )
    trajectory_steps: int = option(
        defaults.TRAJECTORY_STEPS,
        **SAMPLING_STEPS,
        help="denoising steps of the samplings that the student is trained on",
    )
    guidance: float | None = option(
        None, **GUIDANCE, help="strength of guidance of these samplings (default: the family's own)"
    )
    guidance_in: float | None = option(
        None,
        **GUIDANCE,
        help="the student learns the prediction with guidance of this strength, and needs one pass a step "
        "instead of two: it is then drawn with --guidance 1",
    )
    steps: int = option(
        defaults.DISTILL_STEPS,
        least=1,
        most=10**9,
        help="optimiser steps at most; training stops earlier when the student gets no nearer to its teacher",
    )
    batch_size: int = option(
        32,
        least=1,
        most=10**6,
        help="latents per step and process; with guidance, two of each sampling: with caption and without",
    )
    lr: float | None = option(  # type: ignore[assignment]  # a number once a run is planned
        None,
        **SHARE,
        help=f"learning rate of AdamW after the warm-up (default: {defaults.WHY['distill_rate']})",
    )
    schedule: str = option(
        "linear",
        help="schedule of the learning rate after the warm-up; all but constant fall to 0 at --steps",
        choices=["constant", "cosine", "linear"],
    )
    ema: float = option(
        defaults.DISTILL_EMA,
        **SHARE,
        help="largest decay of the moving average of the trained weights, which is saved",
    )
    store: str | None = option(None, help=STORE_HELP, choices=STORES)
    save_dtype: str = option("float32", help="number format of the file or folder", choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None:
            read_options(self.method, self.method_option or [])
        elif self.method_option:
            raise UserError(
                f"--method-option {' '.join(self.method_option)} needs a --method that it is an option of"
            )
        if self.guidance_in is not None and self.guidance is not None:
            raise UserError(
                f"--guidance {self.guidance:g} is of a student that is drawn with guidance, and with "
                f"--guidance-in {self.guidance_in:g} it predicts it itself; give one of them"
            )
        for flag, value in (("frame", self.frame), ("text-encoder", self.text_encoder)):
            if value is not None:
                raise UserError(
                    f"--{flag} {value if isinstance(value, str) else ' '.join(value)} cannot be given: a "
                    "student has the ensemble's frame; leave it out"
                )
        of_captions = [name for name in ("image_column", "caption_column") if getattr(self, name) is not None]
        if self.data.endswith(CAPTIONS) and of_captions:
            flag, value = of_captions[0].replace("_", "-"), getattr(self, of_captions[0])
            raise UserError(
                f"--{flag} {value} is of data with columns, and {self.data} has lines; leave it out"
            )
        if self.prediction_type is not None and self.student == WEIGHTED:
            raise UserError(
                f"--prediction-type {self.prediction_type} is of a file that --student names, and the "
                "student is the mean of the experts; leave it out"
            )
        if self.sheet_guidance is None:  # as the student is to be drawn
            drawn = self.guidance if self.guidance_in is None else 1.0
            object.__setattr__(self, "sheet_guidance", drawn)
        if self.objective != PLAIN:
            raise UserError(
                f"--objective {self.objective} is of training without a teacher, who gives the target here; "
                "leave it out"
            )
        if self.anchor_to == "mean" or self.sparsity:
            flag = "--anchor-to mean" if self.anchor_to == "mean" else f"--sparsity {self.sparsity:g}"
            raise UserError(f"{flag} is of several experts, and one model is trained; leave it out")
        self._check_images()
        ensemble, output = Path(self.ensemble).resolve(), Path(self.output).resolve()
        if ensemble == output or ensemble in output.parents:
            raise UserError(
                f"--output {self.output} is inside the ensemble {self.ensemble}; give another place"
            )

    def _check_images(self) -> None:
        """Raise UserError for options of images where there are none, and for a share without samples."""
        if self.image_share and self.data.endswith(CAPTIONS):
            raise UserError(
                f"--image-share {self.image_share:g} needs images, and --data {self.data} has captions "
                "alone; give images, or leave it out"
            )
        if self.image_share and self.guidance_in is not None:
            raise UserError(
                f"--image-share {self.image_share:g} is of predictions without guidance, as images are, "
                f"and --guidance-in {self.guidance_in:g} is of those with it; give one of them"
            )
        sizes = {"samplings": self.batch_size - self.images_in_batch, "images": self.images_in_batch}
        for what, share in (("samplings", 1 - self.image_share), ("images", self.image_share)):
            if share and not sizes[what]:
                raise UserError(
                    f"--image-share {self.image_share:g} of --batch-size {self.batch_size} leaves no {what}; "
                    "give another share or a larger batch"
                )
        for name in () if self.image_share else OF_IMAGES:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                flag, value = name.replace("_", "-"), getattr(self, name)
                given = f"--{flag}" if value is True else f"--{flag} {value}"
                raise UserError(
                    f"{given} is of training on images, and a student is trained on its own "
                    "samplings; leave it out, or give --image-share"
                )

    @property
    def images_in_batch(self) -> int:
        """How many samples of a batch are images; samplings with guidance come in pairs."""
        return (
            self.batch_size - 2 * round((1 - self.image_share) * self.batch_size / 2)
            if self.image_share
            else 0
        )

    @property
    def single_file(self) -> bool:
        """Whether one file is written, in its publisher's layout."""
        return self.output.endswith(".safetensors")

    @property
    def folder(self) -> Path:
        """Where the run keeps its state, log and record."""
        return Path(self.output).with_suffix(".distill") if self.single_file else Path(self.output)

    def files(self) -> dict[str, str]:
        """Return sha256 of the ensemble and its parts, of the student, and of the rewards."""
        from afa.checkpoint.manifest import read_manifest
        from afa.fingerprint import fingerprint, saved_fingerprint

        names = [entry.name for entry in read_manifest(Path(self.ensemble)).experts]
        own = None if self.student in (WEIGHTED, *names) else self.student
        captions = self.data if self.data.endswith(CAPTIONS) else None
        others = fingerprint(student=own, captions=captions, config=self.config, **self.judges())
        return saved_fingerprint(Path(self.ensemble)) | others
