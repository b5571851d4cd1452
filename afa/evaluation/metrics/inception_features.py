"""Inception features for FID, KID and the inception score: one network, and one set of features, for all three."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.evaluation.metrics.base import Features, batches
from afa.evaluation.metrics.inception import SIDE, Inception, resize
from afa.evaluation.metrics.loading import check_network, load_network, read_tensors
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find

RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS = Part(
    "the FID Inception network",
    "pt_inception-2015-12-05-6726825d.pth",
    url=f"{RELEASE}pt_inception-2015-12-05-6726825d.pth",
    sha256=("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",),
    also=("weights-inception-2015-12-05-6726825d.pth",),  # the same file by torch-fidelity's name
)
PREPROCESSING = "resized to 299 px as TensorFlow 1 did (bilinear, no antialiasing), (x - 128) / 128"


class InceptionFeatures:
    """The 2048 features before the classifier, and the classifier. The network is loaded when first needed."""

    def __init__(self, found: Found, device: torch.device) -> None:
        self.found, self.device = found, device
        check_network(Inception, read_tensors(found.path), found.path)

    @property
    def identity(self) -> dict[str, Any]:
        return {"features": "inception-2048", "preprocessing": "tf1-299", "weights": self.found.identity}

    @property
    def source(self) -> str:
        return f"2048 features of {self.found}, {PREPROCESSING}"

    @cached_property
    def _network(self) -> Inception:
        return load_network(Inception, read_tensors(self.found.path), self.device)

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]], batch_size: int) -> NDArray[np.float32]:
        """n images of any sizes -> (n, 2048)."""
        parts = [self._network(_pixels(batch).to(self.device)) for batch in batches(images, batch_size)]
        return torch.cat(parts).cpu().numpy()

    def logits(self, features: Features) -> NDArray[np.float64]:
        """(n, 2048) -> (n, 1008): the classifier without its bias, as the inception score has always been computed."""
        weight = self._network.fc.weight.cpu().double().numpy()
        return np.asarray(features, np.float64) @ weight.T


def _pixels(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Resized one by one, as they may differ in size: (n, 3, 299, 299) in 0 … 255."""
    return torch.cat([resize(torch.tensor(image).permute(2, 0, 1)[None].float(), SIDE) for image in images])


def inception_features(metric: str, resources: Resources) -> InceptionFeatures:
    """The network, shared by all metrics that were given the same weights. Raises UserError if they are missing."""
    (found,) = find(metric, [WEIGHTS], resources.weights)
    return _shared(found.path.resolve(), tuple(found.hashes.items()), str(resources.device))


@lru_cache(maxsize=2)
def _shared(path: Path, hashes: tuple[tuple[str, str], ...], device: str) -> InceptionFeatures:
    return InceptionFeatures(Found(WEIGHTS, path, dict(hashes)), torch.device(device))
