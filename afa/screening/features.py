"""How far apart experts' features are, stage by stage, each on a path of its own through the network."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Features = Mapping[str, NDArray[np.float32]]  # by stage, (samples, C, places)


def features_apart(one: Features, other: Features) -> dict[str, float]:
    """By stage, ‖f - g‖ over the root mean square of ‖f‖ and ‖g‖: 0 for the same features, √2 for features that have nothing in common."""
    return {stage: _apart(one[stage].astype(np.float64), other[stage].astype(np.float64)) for stage in one}


def _apart(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    size = ((one**2).sum() + (other**2).sum()) / 2
    return float(np.sqrt(((one - other) ** 2).sum() / size)) if size else 0.0


def stage_pairs(names: Sequence[str], found: Sequence[Features]) -> list[dict[str, object]]:
    """Ready for JSON: every pair with its distances by stage."""
    pairs = [(one, other) for one in range(len(names)) for other in range(one + 1, len(names))]
    return [{"experts": [names[one], names[other]], "stages": features_apart(found[one], found[other])} for one, other in pairs]
