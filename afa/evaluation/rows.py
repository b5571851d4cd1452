"""One row of a comparison: how a method makes images, what is chosen, what is trained first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from afa.sampling.sample import Sampler, Sampling

Options = dict[str, Any]
SEARCH = "auto_mbw"  # trains nothing: it tries merges
GUIDED = "distilled_guided"
STUDENTS = {  # rows of afa.evaluation.students, with their titles
    "distilled": "AFA in one model",
    "distilled_lora": "AFA in a LoRA on the weighted merge",
    GUIDED: "AFA in one model, guidance in one pass",
}
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
    axes: Mapping[str, Any] = field(default_factory=dict)
    of: str = ""
    note: str = ""
    based: bool = False
    guided: bool = False
    cost: str = "one model"

    @property
    def method(self) -> str:
        """Return its method as --methods names it: `single` for the row of any expert."""
        return self.name.partition(":")[0]

    @property
    def trainings(self) -> int:
        """Return how many trainings it needs; the ensemble itself was trained once before."""
        if self.train is None or self.name in (SEARCH, SHARED):
            return 0
        return self.runs - (self.name == "afa") + (len(self.candidates) - 1 if self.by_loss else 0)


@dataclass(frozen=True)
class Chosen:
    """A row with what was chosen for it.

    options: of its method
    at:      its value of each setting that has several (settings.AXES), such as {"guidance": 4.0}
    axis:    the setting along which this is a further point of the row's curve; "": it is the row itself
    score:   on the tuning images; None if nothing was scored
    """

    row: MethodRow
    options: Options
    at: Mapping[str, Any] = field(default_factory=dict)
    axis: str = ""
    score: float | None = None

    def sampling(self, protocol: Sampling) -> Sampling:
        """Return how its images are made. protocol: how all others are."""
        return replace(protocol, **apart(self.at, protocol))

    @property
    def point(self) -> str:
        """Return what tells a point of a curve from its row, "guidance 4"; "" for the row itself."""
        return in_words(self.axis, self.at[self.axis]) if self.axis else ""


def in_words(axis: str, value: float) -> str:
    """Return a value of one of settings.AXES in words: guidance 4, or 10 steps."""
    return f"{value:.16g} steps" if axis == "steps" else f"{axis} {value:.16g}"


def apart(at: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    """Return the values that are not those of the protocol's sampling."""
    return {name: value for name, value in at.items() if value != getattr(sampling, name)}
