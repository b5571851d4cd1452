"""An expert: one frozen source model, with the parts of its pipeline."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.errors import UserError
from afa.experts.headers import check_finite
from afa.experts.locate import Located
from afa.experts.parts import first_line, load_part
from afa.experts.prediction import Prediction
from afa.experts.single_file import config_of, read_vae
from afa.models.registry import family_of

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass
class Expert:
    """One frozen source model.

    model: the denoiser; None for a lender that is no expert. text_encoders, tokenizers: in the pipeline's
    order; empty if only a denoiser was given. located: where it came from; None if it was handed over as an
    object. config: of a single file.
    pipeline: the class it was, or would be, loaded with. lender: whose text encoders, tokenizers, scheduler
    and VAE it uses, if it is a denoiser alone (see lending.py). said: what such a one, or its user, says that
    it predicts.
    """

    name: str
    model: Any
    text_encoders: list[Any] = field(default_factory=list)
    tokenizers: list[Any] = field(default_factory=list)
    scheduler: Any = None
    vae: nn.Module | None = None
    pipeline: str | None = None
    pipeline_options: dict[str, Any] = field(default_factory=dict)
    located: Located | None = None
    config: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)  # of its files, once they have been computed
    lender: "Expert | None" = None
    said: Prediction = field(default_factory=Prediction)

    @property
    def family(self) -> str:
        return family_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser; of a lender, of what it lends."""
        found: torch.dtype = next((self.model or self.text_encoders[0]).parameters()).dtype
        return found

    @property
    def has_vae(self) -> bool:
        """Whether there is one in its files, or handed over with it."""
        return self.vae is not None or (self.located is not None and self.located.whole_pipeline)

    def load_vae(self) -> nn.Module:
        """The expert's VAE, or its lender's, read on the first call. Raises UserError if there is none."""
        if self.vae is None and self.located is not None and self.located.whole_pipeline:
            self.vae = load_vae(self.located, self.config, self.dtype)
        if self.vae is None and self.lender is not None:
            return self.lender.load_vae()
        if self.vae is None:
            raise UserError(f"expert '{self.name}' has no VAE; give one with vae=")
        return self.vae


def load_vae(
    located: Located, config: str | None, dtype: torch.dtype, like: Expert | None = None
) -> nn.Module:
    """The VAE of a folder (a whole pipeline, or a VAE alone) or of a single file.

    Raises UserError as load_expert does.

    like: an expert that it is to serve, whose VAE's settings a VAE alone in a file gets.
    """
    from diffusers import AutoencoderKL

    vae: nn.Module
    if located.single_file and located.layout.part != "pipeline":
        vae = read_vae(located.path, like, config, dtype)
    elif located.single_file:
        _, folder = config_of(located, config)
        options = {"config": str(folder), "subfolder": "vae", "local_files_only": True, "dtype": dtype}
        try:
            vae = AutoencoderKL.from_single_file(str(located.path), **options).eval()
        except Exception as error:
            raise UserError(
                f"{located.path} has no VAE that could be read; "
                f"choose another with vae= ({first_line(error)})"
            ) from error
        check_whole(located, folder, {"vae": vae})
    else:
        vae = load_part(located.path, "vae" if located.whole_pipeline else None, dtype)
    check_finite(vae, f"the VAE of {located.path}")
    return vae


def pipeline_options(config: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline was configured with besides its components."""
    return {name: config[name] for name in ("force_zeros_for_empty_prompt",) if name in config}


def check_whole(located: Located, folder: Path, parts: dict[str, Any]) -> None:
    """Raises UserError for modules whose weights a single file did not hold."""
    for name, part in parts.items():
        if isinstance(part, nn.Module) and any(parameter.is_meta for parameter in part.parameters()):
            missing = next(key for key, parameter in part.named_parameters() if parameter.is_meta)
            raise UserError(
                f"{located.path} lacks weights of its {name} (first: {missing}); "
                f"it is no complete checkpoint of config {folder.name}"
            )
