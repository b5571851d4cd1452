"""What a merge of checkpoints is asked to do. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.settings import SEED, WEIGHT, CheckedOptions, check_number, option

# The names of afa.merging.table.MERGES, which needs torch.
METHODS = ["weighted", "mbw", "add_difference", "task_arithmetic", "ties", "dare", "model_stock", "slerp"]
OPTIONS = ("weights", "base_alpha", "alpha", "scale", "density", "drop", "seed", "t")


@dataclass(frozen=True)
class MergeSettings(CheckedOptions):
    """One merge, field by field a flag of `afa merge`."""

    experts: list[str] = option(
        place=True, help="two or more: a diffusers folder, .safetensors file of original layout (SD 1.x, 2.x, XL) or org/name@revision, each optionally NAME=…"
    )
    output: str = option(help="what to write: FILE.safetensors in original layout, or a diffusers folder")
    method: str = option("weighted", help="how to merge", choices=METHODS)
    weights: list[str] | None = option(
        None,
        help="weighted: one number per expert, in any unit (default: equal). mbw: a preset such as GRAD_V, numbers with commas"
        " between them or FILE.toml: the second expert's share of every stage; or one of these per expert",
    )
    base: str | None = option(
        None, place=True, help="add_difference, task_arithmetic, ties, dare, model_stock: the model that the experts were tuned from"
    )
    base_alpha: float | None = option(
        None, help="mbw of two: the second's share of all but the denoiser, if not in --weights (default: 0)"
    )
    alpha: float | None = option(None, help="add_difference: how much of the second's difference is added (default: 1)")
    scale: float | None = option(None, help="task_arithmetic, ties, dare: factor of the sum (default: 0.4; ties: 1)")
    density: float | None = option(None, help="ties: fraction of each tensor's differences that is kept (default: 0.2)")
    drop: float | None = option(None, help="dare: probability with which a difference is dropped (default: 0.5)")
    seed: int | None = option(None, **SEED, help="dare: which differences are dropped, 0 to 2**64 - 1 (default: 0)")
    t: float | None = option(None, help="slerp: from the first expert (0) to the second (1) (default: 0.5)")
    vae: str | None = option(
        None, place=True, help="where the VAE comes from: an expert's name, a VAE's or pipeline's folder, or one .safetensors file (default: the first expert)"
    )
    merge_vae: bool = option(False, help="merge the VAEs, too (averaged VAEs tend to dark and blurry images)")
    dtype: str | None = option(
        None, help="of the result (default: that of the first expert)", choices=["float32", "bfloat16", "float16"]
    )
    config: str | None = option(None, help="sd15, sd21, sdxl, sd3, sd35, flux … or a folder: of single files (default: found out)")
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    dry_run: bool = option(False, help="check everything, print the plan and its size, write nothing")
    json: bool = option(False, help="print one JSON document")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae is not None and self.merge_vae:
            raise UserError(f"--vae {self.vae} takes one VAE and --merge-vae merges them; leave out one")
        if Path(self.output).suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise UserError(f"{self.output} would be a pickle; write FILE.safetensors or a folder")

    @property
    def single_file(self) -> bool:
        """Whether one file of original layout is asked for."""
        return self.output.endswith(".safetensors")

    def options(self) -> dict[str, Any]:
        """The method's own options, as far as they were given. Raises UserError for weights that are no numbers."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        if "weights" in given and self.method == "weighted":
            given["weights"] = _numbers(given["weights"])
        return given


def _numbers(texts: list[str]) -> list[float]:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        raise UserError(f"--weights {' '.join(texts)} are not all numbers; stages are weighted by --method mbw") from None
    for number in numbers:
        check_number(number, "--weights", **WEIGHT)
    return numbers
