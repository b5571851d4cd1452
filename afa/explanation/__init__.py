"""Explain an image: expert weights by place and step, the effect of each word, counterfactual images.

Importing this package loads no torch.
"""

from typing import TYPE_CHECKING

from afa.lazy import exports

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
__getattr__, __dir__ = exports(__name__, _HOMES)
