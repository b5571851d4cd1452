"""afa: Adaptive Feature Aggregation.

Combine several text-to-image diffusion models into one (arXiv:2405.17082).
"""

import os
from typing import TYPE_CHECKING

from afa.lazy import exports

if TYPE_CHECKING:
    from afa.denoiser.hooks import adjust_weights, hide_tokens, only_expert, record_weights, scale_weights
    from afa.denoiser.strengths import Strength
    from afa.ensemble import Ensemble
    from afa.errors import UserError
    from afa.merging.memory import merge_experts, merge_pipelines
    from afa.sampling.weighted_prompts import weighted_prompts

# Read when torch is loaded. Otherwise waiting threads spin, which is many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from afa.version import __version__ as __version__

__all__ = [
    "Ensemble",
    "Strength",
    "UserError",
    "adjust_weights",
    "hide_tokens",
    "merge_experts",
    "merge_pipelines",
    "only_expert",
    "record_weights",
    "scale_weights",
    "weighted_prompts",
]

_HOMES = {
    "Ensemble": "afa.ensemble",
    "Strength": "afa.denoiser.strengths",
    "UserError": "afa.errors",
    "adjust_weights": "afa.denoiser.hooks",
    "hide_tokens": "afa.denoiser.hooks",
    "merge_experts": "afa.merging.memory",
    "merge_pipelines": "afa.merging.memory",
    "only_expert": "afa.denoiser.hooks",
    "record_weights": "afa.denoiser.hooks",
    "scale_weights": "afa.denoiser.hooks",
    "weighted_prompts": "afa.sampling.weighted_prompts",
}
__getattr__, __dir__ = exports(__name__, _HOMES)
