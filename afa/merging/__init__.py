"""Static merges: one new checkpoint from several. Pure functions of tensors, streamed or in memory.

Importing this package loads no torch.
"""

from typing import TYPE_CHECKING

from afa.lazy import exports

if TYPE_CHECKING:
    from afa.merging.engine import merge_files
    from afa.merging.settings import MergeSettings

__all__ = ["MergeSettings", "merge_files"]

_HOMES = {"MergeSettings": "afa.merging.settings", "merge_files": "afa.merging.engine"}
__getattr__, __dir__ = exports(__name__, _HOMES)
