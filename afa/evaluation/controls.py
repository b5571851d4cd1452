"""tmp"""

from afa.evaluation.rows import Row
from afa.evaluation.setup import Setup


def control_rows(setup: Setup) -> list[Row]:
    return []
