"""Distances between experts: weights, predictions, features."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from afa.errors import UserError
from afa.experts.expert import TEXT_ENCODERS
from afa.merging.sources import FileSource, Reader
from afa.models.registry import stage_names

TEXT = "text"  # the name of the text encoders beside the stages
# Experts that are closer (relative distance) are equal up to rounding: 3e-4 for float16, 1.1e-3 for bfloat16.
SAME = 2e-3


@dataclass(frozen=True)
class Distances:
    """Distances between the weights of N experts.

    names:  of the experts
    stages: of the denoiser in order, and TEXT
    grams:  stage -> (N + 1, N + 1) inner products of the experts' differences from a reference; the last row
            is the reference itself: the base model, or else the first expert
    based:  whether the reference is the base model
    """

    names: tuple[str, ...]
    stages: tuple[str, ...]
    grams: dict[str, NDArray[np.float64]]
    based: bool

    def between(self, one: int, other: int, stage: str | None = None) -> float:
        """Return ‖a - b‖ over the root mean square of ‖a‖ and ‖b‖: 0 for the same weights.

        stage: of the denoiser; None: the whole denoiser
        """
        gram = self._gram(stage)
        apart = gram[one, one] + gram[other, other] - 2 * gram[one, other]
        size = (self._norm(gram, one) + self._norm(gram, other)) / 2
        return float(np.sqrt(max(apart, 0.0) / size)) if size else 0.0

    def from_base(self, one: int) -> float:
        """Return ‖a - base‖ / ‖base‖ of the denoiser."""
        gram = self._gram(None)
        return float(np.sqrt(gram[one, one] / gram[-1, -1]))

    def cosine_to_base(self, one: int) -> float:
        """Return the cosine of the denoiser's parameters to the base; 1: the same direction."""
        gram = self._gram(None)
        return float((gram[one, -1] + gram[-1, -1]) / np.sqrt(self._norm(gram, one) * gram[-1, -1]))

    def cosine_of_changes(self, one: int, other: int) -> float | None:
        """Return the cosine of two experts' differences from the base: 1 the same direction, 0 orthogonal.

        None if one of them equals the base.
        """
        gram = self._gram(None)
        size = np.sqrt(gram[one, one] * gram[other, other])
        return float(gram[one, other] / size) if size else None

    def _gram(self, stage: str | None) -> NDArray[np.float64]:
        if stage is not None:
            return self.grams[stage]
        return np.sum([self.grams[name] for name in self.stages if name != TEXT], axis=0)

    @staticmethod
    def _norm(gram: NDArray[np.float64], one: int) -> float:
        """Return ‖a‖², where a is the reference plus the expert's difference."""
        return float(gram[one, one] + 2 * gram[one, -1] + gram[-1, -1])

    def facts(self) -> dict[str, Any]:
        """Return all distances, ready for JSON."""
        count = range(len(self.names))
        pairs = [(one, other) for one in count for other in count if one < other]
        return {
            "pairs": [
                {
                    "experts": [self.names[one], self.names[other]],
                    "distance": self.between(one, other),
                    "stages": {stage: self.between(one, other, stage) for stage in self.stages},
                    "cosine_of_changes": self.cosine_of_changes(one, other) if self.based else None,
                }
                for one, other in pairs
            ],
            "base": {
                self.names[one]: {"cosine": self.cosine_to_base(one), "distance": self.from_base(one)}
                for one in count
            }
            if self.based
            else None,
        }


def distances(sources: Sequence[FileSource], base: FileSource | None = None) -> Distances:
    """Read the weights of all experts once and compute their distances.

    base: the model that the experts were fine-tuned from; None: not known
    """
    reference = sources[0] if base is None else base
    grams: dict[str, NDArray[np.float64]] = {}
    stages = sources[0].stages
    keys = [key for key in _common(sources, reference) if key.partition(".")[0] != "vae"]
    with Reader() as reader:
        for key in tqdm(keys, desc="comparing weights", unit="tensor", file=sys.stderr):
            zero = reference.read(key, reader).double().flatten()
            rows = [source.read(key, reader).double().flatten() - zero for source in sources]
            matrix = torch.stack([*rows, zero])  # (N + 1, numbers)
            stage = TEXT if key.partition(".")[0] in TEXT_ENCODERS else stages[key]
            grams[stage] = grams.get(stage, 0) + (matrix @ matrix.T).numpy()
    ordered = [
        name for name in stage_names(sources[0].model) if name in grams
    ]  # in the order they run, whatever the file's
    return Distances(
        tuple(source.name for source in sources),
        (*ordered, *([TEXT] if TEXT in grams else [])),
        grams,
        base is not None,
    )


def _common(sources: Sequence[FileSource], reference: FileSource) -> list[str]:
    """Return the floating-point keys that all models have. Raises UserError for shapes that differ."""
    shapes = [source.floats() for source in (*sources, reference)]
    keys = [key for key in shapes[0] if all(key in other for other in shapes)]
    for key in keys:
        for source, other in zip((*sources, reference), shapes, strict=True):
            if other[key] != shapes[0][key]:
                raise UserError(
                    f"'{source.name}': {key} is {list(other[key])}, expected {list(shapes[0][key])};"
                    " all must be of one architecture"
                )
    return keys


Features = Mapping[str, NDArray[np.float32]]  # by stage, (samples, C, places)


def features_apart(one: Features, other: Features) -> dict[str, float]:
    """Return for each stage ‖f - g‖ over the root mean square of ‖f‖ and ‖g‖.

    0: the same features; √2: orthogonal features.
    """
    return {stage: _apart(one[stage].astype(np.float64), other[stage].astype(np.float64)) for stage in one}


def _apart(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    size = ((one**2).sum() + (other**2).sum()) / 2
    return float(np.sqrt(((one - other) ** 2).sum() / size)) if size else 0.0


def stage_pairs(names: Sequence[str], found: Sequence[Features]) -> list[dict[str, object]]:
    """Return the distances of every pair of experts by stage, ready for JSON."""
    pairs = [(one, other) for one in range(len(names)) for other in range(one + 1, len(names))]
    return [
        {"experts": [names[one], names[other]], "stages": features_apart(found[one], found[other])}
        for one, other in pairs
    ]
