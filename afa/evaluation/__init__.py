"""Compare ways to combine experts: images, metrics, statistics, a report.

Importing this package loads no torch.
"""

from typing import TYPE_CHECKING

from afa.lazy import exports

if TYPE_CHECKING:
    from afa.evaluation.report.files import write_report
    from afa.evaluation.run import evaluate
    from afa.evaluation.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "evaluate", "write_report"]

_HOMES = {
    "EvaluateSettings": "afa.evaluation.settings",
    "evaluate": "afa.evaluation.run",
    "write_report": "afa.evaluation.report.files",
}
__getattr__, __dir__ = exports(__name__, _HOMES)
