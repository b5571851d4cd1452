"""What a search for block weights is asked to do. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass, fields

from afa.errors import UserError
from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.settings import COUNT, GUIDANCE, SAMPLING_STEPS, SEED, SIDE, CheckedOptions, option

FREE = ("output", "trials", "passes", "metric_weights", "batch_size", "device", "dry_run", "json")  # do not change what a point scores


@dataclass(frozen=True)
class SearchSettings(CheckedOptions):
    """One search, field by field a flag of `afa search`."""

    experts: list[str] = option(place=True, help="two or more: folder, .safetensors file or org/name@revision, each optionally NAME=…")
    output: str = option(help="where the journal and best.toml go; the same command goes on from there")
    prompts: str | None = option(None, help="a file of prompts: one a line, or JSON lines with \"text\"")
    prompt: list[str] | None = option(None, help="one or more prompts")
    images: int = option(8, **COUNT, help="images every merge is judged by; their prompts and noise stay the same")
    metric: str = option("imagereward", help="what is to rise: a metric of one value an image (all of them: afa evaluate --metrics list)")
    metric_weights: str | None = option(None, help="where the metric's weights are: a path or org/name")
    scorer: str | None = option(None, help="instead: a Python file, score(images (n, H, W, 3) uint8, captions) -> dict of n values each, the first counts")
    search: str = option("bayesian", help="bayesian: Optuna over all weights; coordinate: stage by stage, as auto-MBW does", choices=["bayesian", "coordinate"])
    trials: int = option(100, **COUNT, help="bayesian: merges to try")
    passes: int = option(1, **COUNT, help="coordinate: times to go through all stages")
    line: str = option("linear", help="coordinate: how one weight is found", choices=["linear", "binary", "binary_mid"])
    grouping: int = option(1, least=1, most=2, help="coordinate: neighbouring stages changed together")
    means: list[str] = option(["arithmetic"], help="coordinate: mean over the images, one a pass: arithmetic, geometric, harmonic")
    steps: int = option(20, **SAMPLING_STEPS, help="denoising steps")
    guidance: float | None = option(None, **GUIDANCE, help="strength of guidance (default: the family's own)")
    width: int | None = option(None, **SIDE, help="in pixels (default: the experts' own)")
    height: int | None = option(None, **SIDE, help="in pixels (default: the experts' own)")
    seed: int = option(0, **SEED, help="of the noise and of the optimiser, 0 to 2**64 - 1")
    batch_size: int = option(8, **COUNT, help="images made at once")
    config: str | None = option(None, help="sd15, sd21, sdxl, sd3, sd35, flux … or a folder: of single files (default: found out)")
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    dtype: str = option("float32", help="of the models", choices=["float32", "bfloat16", "float16"])
    device: str | None = option(None, help="cpu, cuda, mps … (default: the best there is)")
    dry_run: bool = option(False, help="print what would be done, then stop")
    json: bool = option(False, help="print the result as JSON")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.experts) < 2:
            raise UserError(f"--experts has {len(self.experts)} expert; a merge needs at least two")
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT... or --prompts FILE")
        for mean in self.means:
            if mean not in ("arithmetic", "geometric", "harmonic"):
                raise UserError(f"--means {mean} is none of arithmetic, geometric, harmonic")

    def binding(self) -> dict[str, object]:
        """What must stay the same when a search is resumed."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in FREE}
