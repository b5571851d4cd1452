"""The methods of a comparison by name, and a row: how one method makes images, what is chosen, what is trained first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afa.errors import UserError, unknown
from afa.sampling.sample import Sampler, Sampling

Options = dict[str, Any]
SEARCH = "auto_mbw"  # trains nothing: it tries merges


@dataclass(frozen=True)
class Trained:
    """What training left. file: its weights; parameters: how many were trained; loss: on the held-out images."""

    folder: Path
    file: Path
    parameters: int
    steps: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Row:
    """One method. group: one of results.GROUPS. title: for people.

    sampler: options and training run -> the method, ready to make images. candidates: options to choose among; the first
    is taken where nothing can be chosen by. train: trains run k with some options (or reads what was trained).
    by_loss: candidates are told apart by the held-out loss of run 0 instead of by images. runs: training seeds.
    sampling: where it differs from the protocol's. axes, of: see results.Method. note: for the report.
    based: needs the model that the experts were tuned from.
    """

    name: str
    group: str
    title: str
    sampler: Callable[[Options, int], Sampler]
    candidates: tuple[Options, ...] = ({},)
    train: Callable[[Options, int], Trained] | None = None
    by_loss: bool = False
    runs: int = 1
    sampling: Sampling | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    of: str = ""
    note: str = ""
    based: bool = False


def training_runs(row: Row) -> int:
    """How often a row is trained: every seed once, and at the first with every candidate that is chosen by loss; ours is there at the first."""
    if row.train is None or row.name == SEARCH:
        return 0
    there = row.name == "afa" or ("steps" in row.axes and row.of == "afa")
    return row.runs - there + (len(row.candidates) - 1 if row.by_loss else 0)


METHODS: dict[str, str] = {
    "single": "each expert alone, as the pipeline it came as",
    "single_in_ensemble": "each expert alone in the ensemble's frame (its VAE, text encoders and scheduler): the control for the frame",
    "weighted": "one model of averaged weights",
    "mbw": "one model, weights averaged stage by stage along the community's presets",
    "auto_mbw": "the same with weights searched for by score",
    "add_difference": "the best expert plus what the second learnt",
    "task_arithmetic": "the base plus what all experts learnt",
    "ties": "the same, trimmed and with elected signs",
    "dare": "the same, differences dropped at random",
    "model_stock": "the mean of the experts, drawn back to the base",
    "slerp": "the two best experts, interpolated on the sphere",
    "random_expert": "one expert an image, drawn by its seed",
    "noise_average": "the experts' predictions, averaged",
    "feature_mean": "the untrained ensemble: the experts' features, averaged at every stage",
    "timestep_experts": "each expert in its own range of timesteps",
    "magicfusion": "saliency decides, pixel by pixel, whose prediction counts",
    "superdiff_or": "superposed densities: what any expert would draw",
    "superdiff_and": "superposed densities: what all experts would draw",
    "finetune_best": "a LoRA on the best expert, trained as the ensemble was: equal parameters, equal steps",
    "finetune_best_compute": "the same at equal compute",
    "finetune_merge": "a LoRA on the weighted merge: equal parameters, equal steps",
    "finetune_merge_compute": "the same at equal compute",
    "prediction_router": "one trained aggregator on the experts' predictions, nothing else fused",
    "afa": "the ensemble",
    "best_of_n": "the best of the single experts image by image, known only afterwards: an upper bound for choosing one",
}
ALWAYS = ("single", "afa")  # what everything else is compared with


def chosen_methods(given: Sequence[str]) -> tuple[str, ...]:
    """The methods that were asked for, in the table's order, with what they are compared with. Raises UserError for others."""
    for name in given:
        if name != "all" and name not in METHODS:
            raise UserError(unknown(name, METHODS, "method"))
    return tuple(name for name in METHODS if "all" in given or name in given or name in ALWAYS)
