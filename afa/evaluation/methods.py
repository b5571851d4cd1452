"""From names to rows: what every method of a comparison is made of, and the rows of its studies."""

from collections.abc import Sequence

from afa.evaluation.controls import control_rows
from afa.evaluation.prompt_router import prompt_router_rows
from afa.evaluation.rows import MethodRow
from afa.evaluation.setup import Setup
from afa.evaluation.students import student_rows
from afa.evaluation.trained import ablation_rows, expert_rows, objective_rows, trained_rows
from afa.evaluation.tuning import Tuner
from afa.evaluation.untrained import auto_mbw_rows, merge_rows, sampling_rows

MAKERS = (sampling_rows, merge_rows, control_rows, prompt_router_rows, trained_rows, student_rows)
STUDIES = {"experts": expert_rows, "ablations": ablation_rows, "objectives": objective_rows}


def all_rows(setup: Setup, tuner: Tuner, names: Sequence[str]) -> list[MethodRow]:
    """Return the rows of some methods, in the order of the table; `single` has one for every expert."""
    rows = [*auto_mbw_rows(setup, tuner), *(row for make in MAKERS for row in make(setup))]
    return [row for name in names for row in rows if row.name.partition(":")[0] == name]


def study_rows(setup: Setup) -> list[MethodRow]:
    """Return the rows of the studies that the user asked for."""
    return [row for study in setup.settings.study or () for row in STUDIES[study](setup)]
