"""What is searched: one convex set of weights over the experts for `base` and for every stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from afa.merging.stages import BASE

Weights = dict[str, tuple[float, ...]]  # stage -> one weight an expert


@dataclass(frozen=True)
class Space:
    """stages: of the model, in order, `base` not among them. experts: how many."""

    stages: tuple[str, ...]
    experts: int

    @property
    def places(self) -> tuple[str, ...]:
        """Everything that has weights of its own, in the order in which it is searched: base and a U-Net's middle first."""
        first = (BASE, *(stage for stage in self.stages if stage == "M00"))
        return (*first, *(stage for stage in self.stages if stage not in first))

    def corner(self, expert: int) -> Weights:
        """One expert alone."""
        return dict.fromkeys(self.places, tuple(float(index == expert) for index in range(self.experts)))

    def middle(self) -> Weights:
        """Equal weights."""
        return dict.fromkeys(self.places, (1 / self.experts,) * self.experts)


def moved(weights: Weights, places: Sequence[str], expert: int, share: float) -> Weights:
    """Give an expert a share at some places; the others keep their proportions (equal ones, where they had nothing)."""
    changed = dict(weights)
    for place in places:
        row = weights[place]
        rest = sum(row) - row[expert]
        others = [(value / rest if rest > 0 else 1 / (len(row) - 1)) if index != expert else 0.0 for index, value in enumerate(row)]
        changed[place] = tuple(share if index == expert else (1 - share) * value for index, value in enumerate(others))
    return changed


def key(weights: Mapping[str, Sequence[float]]) -> str:
    """What a point is remembered by: its numbers to six digits."""
    return ";".join(f"{place}:{','.join(f'{value:.6f}' for value in row)}" for place, row in sorted(weights.items()))
