"""From names to rows: what every method of a comparison is made of, and the rows of its studies."""

from collections.abc import Sequence
from dataclasses import replace

from afa.evaluation.controls import control_rows
from afa.evaluation.prompt_router import prompt_router_rows
from afa.evaluation.rows import MethodRow
from afa.evaluation.setup import Setup
from afa.evaluation.trained import ablation_rows, expert_rows, objective_rows, trained_rows
from afa.evaluation.tuning import Tuner
from afa.evaluation.untrained import auto_mbw_rows, merge_rows, sampling_rows

STEPS = (10, 20, 30, 50)
STEPPED = ("weighted", "prediction_router", "afa")  # rows of the study of steps, besides the best expert
MAKERS = (sampling_rows, merge_rows, control_rows, prompt_router_rows, trained_rows)
STUDIES = {"experts": expert_rows, "ablations": ablation_rows, "objectives": objective_rows}


def all_rows(setup: Setup, tuner: Tuner, names: Sequence[str]) -> list[MethodRow]:
    """Return the rows of some methods, in the order of the table; `single` has one for every expert."""
    rows = [*auto_mbw_rows(setup, tuner), *(row for make in MAKERS for row in make(setup))]
    return [row for name in names for row in rows if row.name.partition(":")[0] == name]


def study_rows(setup: Setup, rows: Sequence[MethodRow]) -> list[MethodRow]:
    """Return the rows of the studies that the user asked for."""
    found: list[MethodRow] = []
    for study in setup.settings.study or ():
        found += _stepped(setup, rows) if study == "steps" else STUDIES[study](setup)
    return found


def _stepped(setup: Setup, rows: Sequence[MethodRow]) -> list[MethodRow]:
    """Return rows at other numbers of denoising steps, with one training seed."""
    names = (f"single:{setup.ranking[0]}", *STEPPED)
    return [
        replace(
            row,
            name=f"{row.name}, {steps} steps",
            title=f"{row.title}, {steps} steps",
            sampling=replace(setup.sampling, steps=steps),
            runs=1,
            axes={"steps": steps},
            of=row.name,
        )
        for row in rows
        if row.name in names
        for steps in STEPS
        if steps != setup.sampling.steps
    ]
