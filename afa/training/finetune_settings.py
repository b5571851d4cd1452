"""What fine-tuning is asked to do. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass

from afa.errors import UserError
from afa.settings import option
from afa.training.settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LoopSettings):
    """One LoRA on one expert, field by field a flag of `afa finetune`."""

    expert: str = option(
        place=True,
        help="diffusers folder, .safetensors file or org/name@revision, optionally NAME=…",
        positional=True,
    )
    rank: int | None = option(None, least=1, most=2**20, help="of every pair of matrices")
    like: str | None = option(
        None,
        place=True,
        help="a saved ensemble: take the smallest rank with at least as many trained parameters",
    )
    vae: str | None = option(
        None,
        place=True,
        help="a VAE's or pipeline's folder, or one .safetensors file; the ensemble's, "
        "where the two are compared (default: the expert's own)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rank is None) == (self.like is None):
            raise UserError("give either --rank N or --like ENSEMBLE")

    def files(self) -> dict[str, str]:
        """Of the expert, what was chosen for its frame, and the rewards."""
        from afa.fingerprint import fingerprint

        return fingerprint([self.expert], vae=self.vae, frame=self.frame, config=self.config, **self.judges())
