"""What is generated with: a saved ensemble, or experts that are combined while sampling."""

from collections.abc import Sequence
from pathlib import Path

import torch

from afa.checkpoint.manifest import MANIFEST
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.spec import new_places
from afa.files import settled
from afa.fingerprint import Files, fingerprint, saved_fingerprint, summed


def is_saved(source: str) -> bool:
    """Whether this is the folder of a saved ensemble."""
    return (settled(Path(source)) / MANIFEST).exists()


def source_files(
    sources: Sequence[str], *, experts: Sequence[str] | None = None, frame: str | None = None, config: str | None = None
) -> Files:
    """One hash for every expert, the frame, and the ensemble: what pictures say that they were made with. Arguments: see load_sources."""
    if is_saved(sources[0]):
        return summed(saved_fingerprint(Path(sources[0]), new_places(list(experts or []))))
    return summed(fingerprint(sources, frame=frame, config=config))


def used_files(files: Files, trained: bool) -> Files:
    """Those that a picture depends on. trained: whether the ensemble's own aggregators draw it, not a method that takes its experts only."""
    return {name: found for name, found in files.items() if trained or name != "the ensemble"}


def load_sources(
    sources: Sequence[str],
    *,
    experts: Sequence[str] | None = None,
    frame: str | None = None,
    config: str | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
    placement: str | None = None,
) -> Ensemble:
    """The saved ensemble, or experts as an ensemble: of one, that is the expert, bit for bit.

    experts: new places of a saved ensemble's, NAME=PLACE. frame, config, prediction_type, placement: of experts, see Ensemble.from_experts; `out` takes
    experts of different kinds. Raises UserError for what does not go together.
    """
    kind = getattr(torch, dtype)
    saved = [source for source in sources if is_saved(source)]
    if saved and len(sources) > 1:
        raise UserError(f"{saved[0]} is a saved ensemble, which has its experts; give it alone, or give experts only")
    if saved and frame is not None:
        raise UserError(f"--frame {frame} is for experts, and {saved[0]} is a saved ensemble, which has its frame; leave it out")
    if saved:
        return Ensemble.load(saved[0], new_places(list(experts or [])), dtype=kind)
    if experts:
        raise UserError(f"--experts is for a saved ensemble, and {sources[0]} is none: it has no {MANIFEST}; give experts as SOURCE")
    given = {"frame": frame, "dtype": kind, "config": config, "prediction_type": prediction_type}
    return Ensemble.from_experts(sources, aggregator="mean", placement=placement, **given)
