"""The options of `afa finetune`. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass
from pathlib import Path

from afa.errors import UserError
from afa.settings import option
from afa.training.settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LoopSettings):
    """The options of `afa finetune`; each field is a flag."""

    expert: str = option(
        place=True,
        help="diffusers folder, .safetensors file or org/name@revision, optionally NAME=…",
        positional=True,
    )
    rank: int | None = option(None, least=1, most=2**20, help="rank of the LoRA")
    like: str | None = option(
        None,
        place=True,
        ensemble=True,
        help="a saved ensemble: take the smallest rank with at least as many trained parameters",
    )
    vae: str | None = option(
        None,
        place=True,
        help="a VAE's or pipeline's folder, or one .safetensors file (default: the expert's own); "
        "give the ensemble's VAE to compare with an ensemble",
    )

    output: str = option(
        help="a folder, which gets diffusers' file of the LoRA; or FILE.safetensors with kohya's names, as "
        "ComfyUI, Forge and others read them, with the run's own files in FILE.finetune"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor_to == "mean":
            raise UserError("--anchor-to mean is of several experts, and one is trained; leave it out")
        if (self.rank is None) == (self.like is None):
            raise UserError("give either --rank N or --like ENSEMBLE")

    @property
    def single_file(self) -> bool:
        """Whether one file is written, with kohya's names."""
        return self.output.endswith(".safetensors")

    @property
    def folder(self) -> Path:
        """Where the run keeps its state, log and record."""
        return Path(self.output).with_suffix(".finetune") if self.single_file else Path(self.output)

    def files(self) -> dict[str, str]:
        """Return sha256 of the expert, of what was chosen for its frame, and of the rewards."""
        from afa.fingerprint import fingerprint

        lent = {"vae": self.vae, "frame": self.frame, "text_encoder": self.text_encoder}
        return fingerprint([self.expert], config=self.config, **lent, **self.judges())
