"""One row of a comparison: how a method makes images, what is chosen, what is trained first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afa.sampling.sample import Sampler, Sampling

Options = dict[str, Any]
SEARCH = "auto_mbw"  # trains nothing: it tries merges
SHARED = "afa_shared"  # trains nothing: its ensembles are those of afa


@dataclass(frozen=True)
class Trained:
    """What training left in a folder.

    file:       its weights
    parameters: number of trained parameters
    loss:       on the held-out images
    note:       for the report
    """

    folder: Path
    file: Path
    parameters: int
    steps: int
    seconds: float
    loss: float
    note: str = ""


Train = Callable[[Options, int], Trained]  # options, training run -> what was trained, now or before


@dataclass(frozen=True)
class MethodRow:
    """One row.

    group:      one of results.GROUPS
    title:      for people
    sampler:    options, training run -> the method, ready to make images
    candidates: options to choose among; the first are taken where nothing can be chosen by
    train:      trains a run; None: nothing is trained
    by_loss:    the held-out loss of run 0 chooses the options, instead of images
    runs:       number of training seeds
    sampling:   where it differs from the protocol's
    axes, of:   see results.Method
    note:       for the report
    based:      needs the model that the experts were tuned from
    guided:     needs both predictions of guidance in one pass
    cost:       of a step, as in SamplingMethod
    """

    name: str
    group: str
    title: str
    sampler: Callable[[Options, int], Sampler]
    candidates: tuple[Options, ...] = ({},)
    train: Train | None = None
    by_loss: bool = False
    runs: int = 1
    sampling: Sampling | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    of: str = ""
    note: str = ""
    based: bool = False
    guided: bool = False
    cost: str = "one model"

    @property
    def trainings(self) -> int:
        """Return how many trainings it needs; the ensemble itself was trained once before."""
        if self.train is None or self.name in (SEARCH, SHARED):
            return 0
        there = self.name == "afa" or ("steps" in self.axes and self.of == "afa")
        return self.runs - there + (len(self.candidates) - 1 if self.by_loss else 0)
