"""What a command that draws is given: a saved ensemble, or experts; and the hashes of its files."""

from collections.abc import Sequence
from pathlib import Path

import torch

from afa.checkpoint.manifest import MANIFEST
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.files import settled
from afa.fingerprint import Files, fingerprint, saved_fingerprint, summed

LENT = ("frame", "text_encoder", "vae")  # options for experts that are denoisers alone


def is_saved(source: str) -> bool:
    """Return whether this is the folder of a saved ensemble."""
    return (settled(Path(source)) / MANIFEST).exists()


def source_files(
    sources: Sequence[str],
    *,
    experts: Sequence[str] | None = None,
    frame: str | None = None,
    text_encoder: Sequence[str] | None = None,
    vae: str | None = None,
    config: str | None = None,
    base: str | None = None,
) -> Files:
    """Return one hash for each expert, the frame, the ensemble and the base; PNGs record them.

    Arguments: see load_sources, and `base` of GenerateSettings.
    """
    if is_saved(sources[0]):
        saved = saved_fingerprint(Path(sources[0]), experts or [])
        return summed(saved | fingerprint(base=base))
    lent = {"frame": frame, "text_encoder": text_encoder, "vae": vae}
    return summed(fingerprint(sources, config=config, base=base, **lent))


def used_files(files: Files, trained: bool) -> Files:
    """Return the files that an image depends on.

    trained: whether the ensemble's own aggregators draw it (not a method that takes only its experts)
    """
    return {name: found for name, found in files.items() if trained or name != "the ensemble"}


def load_sources(
    sources: Sequence[str],
    *,
    experts: Sequence[str] | None = None,
    frame: str | None = None,
    text_encoder: Sequence[str] | None = None,
    vae: str | None = None,
    config: str | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
    placement: str | None = None,
) -> Ensemble:
    """Load a saved ensemble, or make one of experts. An ensemble of one expert is that expert, bit for bit.

    experts: new places of a saved ensemble's experts, each NAME=PLACE, or folders to search
    frame, text_encoder, vae, config, prediction_type, placement: of experts, see Ensemble.from_experts;
    placement `out` accepts experts of different architectures
    Raises UserError for options that do not fit together.
    """
    kind = getattr(torch, dtype)
    saved = [source for source in sources if is_saved(source)]
    if saved and len(sources) > 1:
        raise UserError(
            f"{saved[0]} is a saved ensemble, which has its experts; give it alone, or give experts only"
        )
    lent = {"frame": frame, "text-encoder": " ".join(text_encoder or ()) or None, "vae": vae}
    for flag, value in lent.items():
        if saved and value is not None:
            raise UserError(
                f"--{flag} {value} is for experts, and {saved[0]} is a saved ensemble, which has its frame; "
                "leave it out"
            )
    if saved:
        return Ensemble.load(saved[0], experts or [], dtype=kind)
    if experts:
        raise UserError(
            f"--experts is for a saved ensemble, and {sources[0]} is none: it has no {MANIFEST}; "
            "give experts as SOURCE"
        )
    read = {"dtype": kind, "config": config, "prediction_type": prediction_type}
    parts = {"frame": frame, "text_encoders": text_encoder or (), "vae": vae}
    return Ensemble.from_experts(sources, aggregator="mean", placement=placement, **read, **parts)
