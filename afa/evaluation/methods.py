"""From names to rows: what every method of a comparison is made of, and the rows of its studies."""

import dataclasses
from collections.abc import Callable, Sequence

from afa.evaluation.rows import MethodRow
from afa.evaluation.setup import Setup
from afa.evaluation.trained import ablation_rows, control_rows, expert_rows, objective_rows, trained_rows
from afa.evaluation.tuning import Tuner
from afa.evaluation.untrained import auto_mbw_rows, merge_rows, sampling_rows

STEPS = (10, 20, 30, 50)
STEPPED = (
    "weighted",
    "prediction_router",
    "afa",
)  # besides the best expert: what the study of steps looks at
MAKERS: tuple[Callable[[Setup], list[MethodRow]], ...] = (
    sampling_rows,
    merge_rows,
    control_rows,
    trained_rows,
)


def all_rows(setup: Setup, tuner: Tuner, names: Sequence[str]) -> list[MethodRow]:
    """The rows of some methods, in the order of the table; `single` has one for every expert."""
    rows = [*auto_mbw_rows(setup, tuner), *(row for make in MAKERS for row in make(setup))]
    return [row for name in names for row in rows if row.name.partition(":")[0] == name]


def study_rows(setup: Setup, rows: Sequence[MethodRow], studies: Sequence[str]) -> list[MethodRow]:
    """What studies add.

    Other numbers of steps, fewer experts, the ensemble without one of its parts, other objectives.
    """
    makers: dict[str, Callable[[], list[MethodRow]]] = {
        "steps": lambda: _stepped(setup, rows),
        "experts": lambda: expert_rows(setup),
        "ablations": lambda: ablation_rows(setup),
        "objectives": lambda: objective_rows(setup),
    }
    return [row for study in studies for row in makers[study]()]


def _stepped(setup: Setup, rows: Sequence[MethodRow]) -> list[MethodRow]:
    """Rows at other numbers of denoising steps, one training seed."""
    names = (f"single:{setup.ranking[0]}", *STEPPED)
    return [
        dataclasses.replace(
            row,
            name=f"{row.name}, {steps} steps",
            title=f"{row.title}, {steps} steps",
            sampling=dataclasses.replace(setup.sampling, steps=steps),
            runs=1,
            axes={"steps": steps},
            of=row.name,
        )
        for row in rows
        if row.name in names
        for steps in STEPS
        if steps != setup.sampling.steps
    ]
