"""Screen experts before training: is this set worth ensembling, and which experts of it?

Importing this package loads no torch.
"""

from typing import TYPE_CHECKING

from afa.lazy import exports

if TYPE_CHECKING:
    from afa.screening.run import screen
    from afa.screening.settings import ScreenSettings

__all__ = ["ScreenSettings", "screen"]

_HOMES = {
    "ScreenSettings": "afa.screening.settings",
    "screen": "afa.screening.run",
}
__getattr__, __dir__ = exports(__name__, _HOMES)
