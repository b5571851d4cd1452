"""Inception score: does every image show one thing for certain, and do they show many things? Looks at no real images.

IS = exp E KL(p(y|x) ‖ p(y)). Source: Salimans et al., arXiv:1606.03498. Deviation: over all images at once, where the paper
averages over ten parts (a value that depends on their order, and a little lower).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from afa.evaluation.metrics.base import Features, Indices, SetMetric, Values, copies
from afa.evaluation.metrics.inception_features import InceptionFeatures, inception_features
from afa.evaluation.metrics.table import Resources

Array = NDArray[np.float64]


class InceptionScore(SetMetric):
    """From 1 (all images alike, or uncertain) to the number of classes; higher is better."""

    name = "inception_score"
    needs_reference: ClassVar[bool] = False

    def __init__(self, extract: InceptionFeatures, batch_size: int) -> None:
        self.extract, self.batch_size = extract, batch_size
        self.source = f"exp E KL over all images, 1008 classes (without bias) from {extract.source}; arXiv:1606.03498"

    @property
    def identity(self) -> dict[str, Any]:
        return self.extract.identity

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        return self.extract(images, self.batch_size)

    def value(self, features: Features, reference: None) -> float:
        logs = log_softmax(self.extract.logits(features))
        return float(score(logs, np.ones((1, len(logs))))[0])

    def replicates(self, features: Features, groups: Indices, reference: None, draws: Indices) -> Values:
        logs = log_softmax(self.extract.logits(features))
        return np.concatenate([score(logs, times[None].astype(np.float64)) for times in copies(groups, draws)])


def log_softmax(logits: Array) -> Array:
    """(n, classes) -> log probabilities."""
    shifted = logits - logits.max(1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def score(logs: Array, times: Array) -> Values:
    """log p(y|x) (n, classes), how often each image counts (R, n) -> (R,).

    E KL(p(y|x) ‖ p(y)) is the entropy of the mean less the mean entropy.
    """
    each = np.exp(logs)
    share = times / times.sum(1, keepdims=True)
    mean = share @ each
    entropy = -np.sum(mean * np.log(np.where(mean > 0, mean, 1)), axis=1)
    found: Values = np.exp(entropy + share @ np.sum(np.where(each > 0, each * logs, 0), axis=1))
    return found


def make(resources: Resources) -> InceptionScore:
    """The inception score with its weights. Raises UserError if they are missing."""
    return InceptionScore(inception_features("inception_score", resources), resources.batch_size)
