"""What a merge of checkpoints, and a search for block weights, are asked to do.

No heavy imports: help comes from here.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from afa.errors import UserError
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.merging.registry import MERGES, flag_help, read_options
from afa.settings import (
    CONFIG_HELP,
    COUNT,
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    GUIDANCE,
    SAMPLING_STEPS,
    SEED,
    SIDE,
    WEIGHT,
    CheckedOptions,
    check_number,
    kind_of,
    option,
)

FLAGS = (
    "weights",
    "base_alpha",
    "alpha",
    "scale",
    "density",
    "drop",
    "seed",
    "t",
)  # options of merges that are flags
BESIDE_RECIPE = ("recipe", "experts", "output", "config", "prediction_type", "device", "dry_run", "json")


@dataclass(frozen=True)
class MergeSettings(CheckedOptions):
    """One merge, field by field a flag of `afa merge`."""

    experts: list[str] | None = option(
        None,
        place=True,
        help=(
            "two or more models: a diffusers folder, a .safetensors file or org/name@revision; NAME=… gives"
            " one a name, …+LORA.safetensors*STRENGTH adds a LoRA. With --recipe MERGED: NAME=PLACE of inputs"
            " that are not in its folder"
        ),
    )
    output: str = option(None, help="FILE.safetensors in the publisher's layout, or a diffusers folder")
    recipe: str | None = option(
        None,
        help=(
            "instead of experts and options: a .toml file of steps, or a file or folder that afa merge made,"
            " to make it again"
        ),
    )
    # names are its keys
    method: str = option("weighted", help="method, see above", choices=MERGES)  # type: ignore[arg-type]
    weights: list[str] | None = option(
        None,
        help=(
            "weighted: one number for each expert, in any unit (default: equal). mbw: the second expert's"
            " share of every stage, as a preset such as GRAD_V, numbers with commas between them, or"
            " FILE.toml; or one of these for each expert"
        ),
    )
    base: str | None = option(
        None,
        place=True,
        help=f"{', '.join(name for name, merge in MERGES.items() if merge.needs('base'))}:"
        " the model that the experts were fine-tuned from",
    )
    base_alpha: float | None = option(None, help=flag_help("base_alpha"))
    alpha: float | None = option(None, help=flag_help("alpha"))
    scale: float | None = option(None, help=flag_help("scale"))
    density: float | None = option(None, help=flag_help("density"))
    drop: float | None = option(None, help=flag_help("drop"))
    seed: int | None = option(None, **SEED, help=flag_help("seed"))
    t: float | None = option(None, help=flag_help("t"))
    method_option: list[str] | None = option(
        None, help="KEY=VALUE: an option of the method that has no flag of its own"
    )
    vae: str | None = option(
        None,
        place=True,
        help=(
            "source of the VAE: the name of an expert, the folder of a VAE or a pipeline, or a .safetensors"
            " file (default: the first expert)"
        ),
    )
    merge_vae: bool = option(
        False, help="merge the VAEs too (averaged VAEs often make images dark and blurry)"
    )
    dtype: str | None = option(
        None, help="number type of the result (default: that of the first expert)", choices=DTYPES
    )
    device: str = option("cpu", help="device that computes, one tensor after the other: cpu, cuda, mps …")
    config: str | None = option(None, help=CONFIG_HELP)
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    dry_run: bool = option(
        False, help="check everything, print the plan and the size of the result, write nothing"
    )
    json: bool = option(False, help="print one JSON document")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output:
            raise UserError("--output is needed: FILE.safetensors or a folder to write")
        if self.recipe is None and not self.experts:
            raise UserError("--experts is needed, two or more, or a --recipe")
        if self.recipe is not None:
            given = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
            extra = [name for name in given if name not in BESIDE_RECIPE]
            extra += ["experts"] if self.experts and self.recipe.endswith(".toml") else []
            if extra:
                flag = extra[0].replace("_", "-")
                raise UserError(
                    f"--recipe {self.recipe} says all of the merge; leave out --{flag}, or write it there"
                )
        if self.vae is not None and self.merge_vae:
            raise UserError(f"--vae {self.vae} takes one VAE and --merge-vae merges them; leave out one")
        if Path(self.output).suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise UserError(f"{self.output} would be a pickle; write FILE.safetensors or a folder")

    @property
    def single_file(self) -> bool:
        """Whether one file of original layout is asked for."""
        return self.output.endswith(".safetensors")

    def options(self) -> dict[str, Any]:
        """The method's own options, as far as they were given.

        Raises UserError for weights that are no numbers.
        """
        given = {name: getattr(self, name) for name in FLAGS if getattr(self, name) is not None}
        own = fields(MERGES[self.method].options)
        numbers = [field.name for field in own if kind_of(field.type) == (float, True)]
        given |= {name: _numbers(given[name]) for name in numbers if name in given}
        return given | read_options(self.method, self.method_option or [])


def _numbers(texts: list[str]) -> list[float]:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        advice = "stages are weighted by --method mbw"
        raise UserError(f"--weights {' '.join(texts)} are not all numbers; {advice}") from None
    for number in numbers:
        check_number(number, "--weights", **WEIGHT)
    return numbers


@dataclass(frozen=True)
class SearchSettings(CheckedOptions):
    """One search, field by field a flag of `afa search`."""

    free: ClassVar[tuple[str, ...]] = tuple(
        "output trials passes metric_weights batch_size device dry_run json".split()
    )

    experts: list[str] = option(
        place=True,
        help="two or more models: a folder, a .safetensors file or org/name@revision; NAME=… names one",
    )
    output: str = option(
        help="folder for the journal and best.toml; the same command continues the search in it"
    )
    prompts: str | None = option(None, help='a file of prompts: one in each line, or JSON lines with "text"')
    prompt: list[str] | None = option(None, help="one or more prompts")
    images: int = option(
        8, **COUNT, help="images drawn with every merge, always from the same prompts and noise"
    )
    metric: str = option(
        "imagereward",
        help="metric to improve, one that scores every image (list: afa evaluate --metrics list)",
    )
    metric_weights: str | None = option(None, help="weights of the metric: a path or org/name")
    scorer: str | None = option(
        None,
        help=(
            "instead of a metric: a Python file with score(images, captions), images (n, H, W, 3) uint8, that"
            " returns a dict of n values each; the first entry counts"
        ),
    )
    search: str = option(
        "bayesian",
        help="bayesian: Optuna changes all weights at once; coordinate: one stage after the other (auto-MBW)",
        choices=["bayesian", "coordinate"],
    )
    trials: int = option(100, **COUNT, help="bayesian: number of merges to try")
    passes: int = option(1, **COUNT, help="coordinate: number of passes through all stages")
    line: str = option(
        "linear",
        help="coordinate: how the weight of a stage is searched",
        choices=["linear", "binary", "binary_mid"],
    )
    grouping: int = option(
        1, least=1, most=2, help="coordinate: number of neighbouring stages that change together"
    )
    means: list[str] = option(
        ["arithmetic"],
        help="coordinate: mean over the images, one for each pass",
        choices=["arithmetic", "geometric", "harmonic"],
    )
    steps: int = option(20, **SAMPLING_STEPS, help="denoising steps")
    guidance: float | None = option(None, **GUIDANCE, help="strength of guidance (default: the family's own)")
    width: int | None = option(None, **SIDE, help="width of the images in pixels (default: the experts' own)")
    height: int | None = option(
        None, **SIDE, help="height of the images in pixels (default: the experts' own)"
    )
    seed: int = option(0, **SEED, help="seed of the noise and of the optimiser, 0 to 2**64 - 1")
    batch_size: int = option(8, **COUNT, help="number of images drawn at once")
    config: str | None = option(None, help=CONFIG_HELP)
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    dtype: str = option("float32", help=DTYPE_HELP, choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
    dry_run: bool = option(False, help="print how many merges and images would be made, then stop")
    json: bool = option(False, help="print the result as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.experts) < 2:
            raise UserError(f"--experts has {len(self.experts)} expert; a merge needs at least two")
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT... or --prompts FILE")
