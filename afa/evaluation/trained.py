"""The rows that are trained: the ensemble at several seeds, a router on the predictions, and the ablations."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afa.checkpoint.manifest import AGGREGATORS, read_manifest
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.placement import fused_stages
from afa.evaluation.rows import Options, Row, Trained
from afa.evaluation.setup import Setup
from afa.generation.sample import Sampler, sample
from afa.training.run import finished, plan, train

# title -> what is changed in the ensemble's own recipe; what it already is, is left out
ABLATIONS: dict[str, dict[str, Any]] = {
    "one path (sabw)": {"aggregator": "sabw"},
    "own paths (stitch)": {"aggregator": "stitch"},
    "no text": {"ignore": ["text"]},
    "no time": {"ignore": ["time"]},
    "no spatial map": {"ignore": ["place"]},
    "depth 0": {"depth": 0},
    "depth 1": {"depth": 1},
    "depth 2": {"depth": 2},
    "text tokens fused": {"text_stream": "fused"},
    "placement layers": {"placement": "layers"},
    "placement blocks": {"placement": "blocks"},
    "placement out": {"placement": "out"},
}


def trained_rows(setup: Setup) -> list[Row]:
    """The prediction router, and the ensemble."""
    router = functools.partial(_train, setup, "prediction_router", {"placement": "out"})
    return [
        _row(setup, "prediction_router", "control", "prediction router", router),
        _row(setup, "afa", "ours", "AFA", functools.partial(afa_run, setup)),
    ]


def ablation_rows(setup: Setup) -> list[Row]:
    """The ensemble's recipe with one thing changed, trained anew."""
    denoiser = setup.ensemble.denoiser
    recorded = setup.training(setup.output, 0, placement=denoiser.placement)  # the family's, where nobody chose one
    changed = {title: changes for title, changes in ABLATIONS.items() if any(_value(recorded, name) != value for name, value in changes.items())}
    changed = {title: changes for title, changes in changed.items() if _differs(denoiser, changes)}
    return [
        _row(setup, f"afa, {title}", "ours", title, functools.partial(_train, setup, folder_name(title), changes), axes={"variant": title}, of="afa")
        for title, changes in changed.items()
    ]


def _differs(denoiser: EnsembleDenoiser, changes: Mapping[str, Any]) -> bool:
    """Whether a change makes a difference in this family: its blocks may not change text tokens, or be stages already."""
    if "text_stream" in changes:
        return denoiser.call.streams
    return "placement" not in changes or fused_stages(changes["placement"], denoiser.stages) != denoiser.fused


def expert_rows(setup: Setup) -> list[Row]:
    """The ensemble of the two best experts, of the three best …, trained anew; of all: the ensemble itself."""
    specs = dict(zip(setup.names, setup.expert_specs(), strict=True))
    rows = []
    for count in range(2, len(setup.names)):
        chosen = [name for name in setup.names if name in setup.ranking[:count]]
        changes = {"experts": [specs[name] for name in chosen], "vae": None}
        train_them = functools.partial(_train, setup, f"experts-{'-'.join(chosen)}", changes)
        title = f"AFA of {', '.join(chosen)}"
        rows.append(_row(setup, f"afa, {count} experts", "ours", title, train_them, axes={"experts": count}, of="afa", names=chosen))
    return rows


def _value(recorded: Any, name: str) -> Any:
    value = getattr(recorded, name)
    return list(value) if isinstance(value, (list, tuple)) else value


def folder_name(title: str) -> str:
    """A title as a folder is called."""
    return "".join(letter if letter.isalnum() else "-" for letter in title).strip("-")


def _row(
    setup: Setup, name: str, group: str, title: str, make: Any, *, axes: Mapping[str, Any] | None = None, of: str = "", names: Sequence[str] = ()
) -> Row:
    sampler = functools.partial(trained_sampler, setup, make, tuple(names))
    return Row(name, group, title, sampler, train=make, runs=setup.settings.seeds, axes=axes or {}, of=of)


def afa_run(setup: Setup, options: Options, run: int) -> Trained:
    """The ensemble as it was given, and its like at later seeds."""
    return read_trained(setup.folder) if run == 0 else _train(setup, "afa", {}, options, run)


def _train(setup: Setup, name: str, changes: dict[str, Any], options: Options, run: int) -> Trained:
    """Train by the ensemble's recipe with some changes, on experts that are in memory already; what is trained is only read."""
    settings = setup.training(setup.output / "trained" / name / f"seed-{run}", run, **changes)
    if finished(settings) is None:
        shared = None
        if settings.experts == setup.expert_specs() and settings.dtype == setup.settings.dtype and settings.store is None:
            shared = setup.ensemble.sharing(
                settings.aggregator,
                settings.placement,
                attention_up_to=settings.attention_up_to,
                text_stream=settings.text_stream,
                **settings.aggregator_options(),
            )
        train(settings, plan(settings, shared))
    return read_trained(Path(settings.output))


def read_trained(folder: Path) -> Trained:
    """What training left in a folder."""
    manifest = read_manifest(folder)
    record = manifest.training or {}
    return Trained(
        folder,
        folder / AGGREGATORS,
        manifest.aggregator["parameters"],
        record.get("steps", 0),
        record.get("seconds", 0.0),
        record.get("held_out_loss", {}).get("trained", {}).get("value", float("nan")),
    )


def trained_sampler(setup: Setup, make: Any, names: tuple[str, ...], options: Options, run: int) -> Sampler:
    """A stock pipeline around the trained ensemble; experts in memory are shared."""
    folder = make(options, run).folder
    if names:
        from afa.ensemble import Ensemble

        by_name = dict(zip(setup.names, setup.ensemble.experts, strict=True))
        ensemble = Ensemble.from_experts([by_name[name] for name in names], aggregators=folder)
    else:
        ensemble = setup.ensemble.sharing(aggregators=folder)
    return functools.partial(sample, setup.pipeline(ensemble))
