"""Static merges: one new checkpoint from several. Pure functions of tensors, streamed key by key or applied in memory.

Importing this package loads no torch.
"""

from typing import TYPE_CHECKING

from afa.lazy import exports

if TYPE_CHECKING:
    from afa.merging.run import merge_files
    from afa.merging.settings import MergeSettings

__all__ = ["MergeSettings", "merge_files"]

_HOMES = {
    "MergeSettings": "afa.merging.settings",
    "merge_files": "afa.merging.run",
}
__getattr__, __dir__ = exports(__name__, _HOMES)
