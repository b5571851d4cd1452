"""The training settings in a manifest with which baselines are trained.

A manifest may come from a stranger. Only numbers and choices are read from it, never code or places: data,
rewards, loggers, caches and outputs come from the command line.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from afa.checkpoint.manifest import MANIFEST, TEXT_ENCODERS, Manifest, frame_places
from afa.data.registry import DRAWN
from afa.errors import UserError
from afa.experts.shipped import KNOWN_CONFIGS
from afa.schema import shown
from afa.training.choices import as_begun
from afa.training.settings import TrainSettings

# Options that name neither code nor a file, of which a recorded value is taken; see also taken().
TAKEN = frozenset(
    """
    objective snr_gamma weighting timesteps timestep_range band_weights reward_weight reward_reach
    better worse draft_steps draft_last draft_again draft_guidance
    anchor anchor_to sparsity sparsity_top image_column caption_column limit
    crops flip max_skipped steps batch_size accumulate lr warm_up schedule weight_decay clip ema
    caption_dropout resolution buckets bucket_step bucket_sides
    held_out evaluate_every patience save_every seed dtype
    gradient_checkpointing checkpoint_large_maps
    aggregator placement attention_up_to text_stream store prediction_type
    """.split()
)
OWN = frozenset(
    {"experts", "start", "output", "recipe", "device", "json", "dry_run"}
)  # of every run, so that nothing is lost without it


def taken() -> frozenset[str]:
    """Return the names of all options of which a recorded value is taken."""
    return TAKEN.union(TrainSettings.option_fields())


def recorded_settings(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return the recorded options that a baseline is trained with.

    Raises UserError if the ensemble was not trained by `afa train`, or continued another ensemble.
    """
    recorded = (manifest.training or {}).get("settings")
    if recorded is None:
        raise UserError(f"{folder} was not trained by `afa train`, so nothing can be trained as it was")
    if recorded.get("start") is not None:
        start = shown(recorded["start"])
        raise UserError(
            f"{folder} was trained further from {start}, so it is no recipe for others; compare its start, "
            "or use --seeds 1"
        )
    settings = as_begun(recorded)
    return {name: value for name, value in settings.items() if name in taken()} | _frame(
        manifest, folder, settings
    )


def recorded_data(manifest: Manifest) -> str | None:
    """Return the recorded training data if afa draws them; None if they are a place on a machine."""
    data = (manifest.training or {}).get("settings", {}).get("data")
    return data if isinstance(data, str) and data.startswith(tuple(DRAWN)) else None


def print_recorded(manifest: Manifest, folder: Path) -> None:
    """Print to stderr which recorded options baselines are trained with, and which are not used."""
    settings = as_begun((manifest.training or {}).get("settings", {}))
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings.current())}
    used = [
        f"{name} {shown(value)}"
        for name, value in settings.items()
        if name in taken() and defaults[name] != value
    ]
    print(
        f"afa: rivals are trained as {folder / MANIFEST} records: {', '.join(used) or 'with the defaults'}",
        file=sys.stderr,
    )
    read = taken() | OWN | ({"data"} if recorded_data(manifest) is not None else set())
    left = [
        f"{name} {shown(value)}"
        for name, value in settings.items()
        if name not in read and value not in (None, defaults.get(name))
    ]
    if left:
        print(
            f"afa: not used, since they name places or code: {', '.join(left)}; "
            "this command takes them from --train-data and --reward",
            file=sys.stderr,
        )


def _frame(manifest: Manifest, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's VAE, frame, text encoders and config if the user gave them to the training.

    Their places are checked as those of experts are.
    """
    config = next((entry.config for entry in manifest.experts if entry.config), None)
    frame = frame_places(manifest, folder)
    places: dict[str, Any] = {
        "vae": frame.get("vae"),
        "frame": frame.get("frame"),
        "text_encoder": [frame[name] for name in TEXT_ENCODERS if name in frame],
        "config": config if config in {*KNOWN_CONFIGS, None} else str(folder / str(config)),
    }
    return {name: place for name, place in places.items() if settings.get(name) is not None}
