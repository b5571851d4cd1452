"""Why an image came out as it did: who weighed what, which words decide, what would have been without. Importing this package costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afa.explanation.explanation import Explanation, explain
    from afa.explanation.recording import Recording, record

_HOMES = {
    "Explanation": "afa.explanation.explanation",
    "Recording": "afa.explanation.recording",
    "explain": "afa.explanation.explanation",
    "record": "afa.explanation.recording",
}
__all__ = ["Explanation", "Recording", "explain", "record"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that the command's help needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'afa.explanation' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
