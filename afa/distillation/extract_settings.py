"""The options of `afa extract`. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass

from afa.experts.spec import PREDICTION_HELP, PREDICTION_TYPES
from afa.settings import CONFIG_HELP, DEVICE_HELP, DTYPES, CheckedOptions, option


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(CheckedOptions):
    """One LoRA of a difference, field by field a flag of `afa extract`."""

    tuned: str = option(place=True, help="the model whose difference is taken", positional=True)
    base: str = option(place=True, help="the model that the LoRA is used on, of the same architecture")
    rank: int = option(32, least=1, most=2**20, help="rank of every layer, at most the layer's own")
    output: str = option(
        help="FILE.safetensors with kohya's names, as ComfyUI, Forge and others read them, or a folder with "
        "diffusers' file"
    )
    denoiser_only: bool = option(False, help="leave out the text encoders")
    dtype: str = option("float16", help="number format of the LoRA", choices=DTYPES)
    device: str | None = option(None, help=DEVICE_HELP)
    config: str | None = option(None, help=CONFIG_HELP)
    prediction_type: str | None = option(None, help=PREDICTION_HELP, choices=list(PREDICTION_TYPES))
    dry_run: bool = option(False, help="check both models, say what would be written, and stop")
    json: bool = option(False, help="print one JSON document")

    @property
    def single_file(self) -> bool:
        """Whether one file is written, with kohya's names."""
        return self.output.endswith(".safetensors")
