"""The Fréchet distance of two sets of features, each taken as a Gaussian.

d² = |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½). Source: Heusel et al., arXiv:1706.08500. Covariances divide by n - 1, everything
is float64, as in the published implementations.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs of the reference: mean (D,), the trace of its covariance, and a root of it (r, D).

    root.T @ root is the covariance.
    """

    mean: Array
    trace: float
    root: Array


def moments(features: NDArray[np.floating]) -> Moments:
    """features (n, D) -> their moments; the root has min(n, D) rows. Raises ValueError for fewer than two."""
    mean, centred = _centred(features)
    n, width = centred.shape
    if n > width:  # a root of D rows is smaller than the centred features
        values, vectors = np.linalg.eigh(centred.T @ centred)
        centred = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    return Moments(mean, float(np.sum(centred**2)), centred)


def frechet_distance(features: NDArray[np.floating], reference: Moments) -> float:
    """The squared distance of features (n, D) to a reference.

    tr (Σ₁ Σ₂)^½ is the sum of the singular values of A B', where A'A = Σ₁ and B'B = Σ₂: exact, without a square root of
    an ill-conditioned product, and small where there are fewer images than features.
    """
    own = moments(features)
    cross = np.linalg.svd(own.root @ reference.root.T, compute_uv=False).sum()
    distance = np.sum((own.mean - reference.mean) ** 2) + own.trace + reference.trace - 2 * cross
    return float(max(distance, 0.0))


def _centred(features: NDArray[np.floating]) -> tuple[Array, Array]:
    """Mean (D,), and the centred features over √(n - 1)."""
    values = np.asarray(features, np.float64)
    if len(values) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images, got {len(values)}")
    mean = values.mean(0)
    return mean, (values - mean) / np.sqrt(len(values) - 1)
