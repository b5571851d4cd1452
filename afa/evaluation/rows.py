"""The methods of a comparison by name, and a row.

How one method makes images, what is chosen, what is trained first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afa.sampling.sample import Sampler, Sampling

Options = dict[str, Any]
SEARCH = "auto_mbw"  # trains nothing: it tries merges


@dataclass(frozen=True)
class Trained:
    """What training left.

    file: its weights; parameters: how many were trained; loss: on the held-out images.
    """

    folder: Path
    file: Path
    parameters: int
    steps: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class MethodRow:
    """One method. group: one of results.GROUPS. title: for people. cost: of a step, as in SamplingMethod.

    sampler: options and training run -> the method, ready to make images. candidates: options to choose
             among; the first
    is taken where nothing can be chosen by. train: trains run k with some options (or reads what was
    trained).
    by_loss: candidates are told apart by the held-out loss of run 0 instead of by images. runs: training
             seeds.
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
    cost: str = "one model"


def training_runs(row: MethodRow) -> int:
    """How often a row is trained.

    Every seed once, and at the first with every candidate that is chosen by loss; ours is there at the first.
    """
    if row.train is None or row.name == SEARCH:
        return 0
    there = row.name == "afa" or ("steps" in row.axes and row.of == "afa")
    return row.runs - there + (len(row.candidates) - 1 if row.by_loss else 0)
