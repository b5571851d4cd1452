"""Train the aggregators of an ensemble. Importing this package loads no torch."""

from typing import TYPE_CHECKING

from afa.lazy import exports

if TYPE_CHECKING:
    from afa.training.run import train
    from afa.training.settings import TrainSettings

__all__ = ["TrainSettings", "train"]

_HOMES = {
    "TrainSettings": "afa.training.settings",
    "train": "afa.training.run",
}
__getattr__, __dir__ = exports(__name__, _HOMES)
