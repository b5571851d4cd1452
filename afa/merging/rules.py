"""The merges: pure functions of one key's tensors, and what each of them says about itself.

A rule takes the experts' tensors of one key, in float32 or finer, and says by its keyword arguments what else
it needs. `base` (the same key of the model that the experts come from), `stage` and `key` (where the tensors
stand) and `note` come from the engine. All others are the rule's options: their annotation carries help and
bounds, their default is the default. dᵢ = θᵢ - base are the experts' differences, their task vectors.

To add a merge: one file with a rule and its `Merge`, and one line in registry.py. torch is imported inside
the rules that need more than the tensors' own methods, so that the command line's help comes without it.
"""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from afa.settings import SEED, SHARE, Bounds, CheckedOptions, one_ahead, option, shares

if TYPE_CHECKING:
    from torch import Tensor

BASE = "base"  # the stage of everything but the denoiser
GIVEN = ("base", "stage", "key", "note")  # what the engine gives to a rule
OPPOSITE = 1e-12  # |â + b̂| below this is rounding in float64
ORDERS = ("best first", "second first")  # of the two best experts of a comparison
SCALES = (0.3, 0.5, 0.7, 1.0)
Options = dict[str, Any]


class Option:
    """Stands in the annotation of a rule's option: its help and its bounds."""

    def __init__(self, help: str, **bounds: Unpack[Bounds]) -> None:
        self.help, self.bounds = help, bounds


@functools.cache
def parameters_of(rule: Callable[..., "Tensor"]) -> tuple[str, ...]:
    """The names of a rule's parameters."""
    return tuple(inspect.signature(rule).parameters)


@dataclass(frozen=True)
class Merge:
    """Everything about one merge.

    rule:       (tensors, *, what it needs, its options) -> the merged tensor
    title:      of its row in tables and charts
    help:       the formula, for the command line
    row:        what its row in a comparison is
    experts:    how many it takes, the base not among them; None: any number
    candidates: (number of experts, stages) -> options worth trying in a comparison, the default first.
                `order` says which of the two best experts comes first; `preset`, or `first` and `last`,
                describe block weights along the stages
    fill:       (number of experts, stages, *, options) -> all options that the rule needs; default: those
                given, and defaults. Where there is one, the options are its arguments
    by_stage:   whether its option `weights` is one set for every stage, and `base`
    float64:    whether it computes in float64, which Apple's GPUs do not
    """

    rule: Callable[..., "Tensor"]
    title: str
    help: str
    row: str
    experts: int | None = None
    candidates: Callable[[int, Sequence[str]], list[Options]] = lambda count, stages: [{}]
    fill: Callable[..., Options] | None = None
    by_stage: bool = False
    float64: bool = False

    @property
    def name(self) -> str:
        return self.rule.__name__

    @functools.cached_property
    def options(self) -> type[CheckedOptions]:
        """Its options as a dataclass, made from the annotations: name, type, default, help and bounds."""
        fields = []
        for one in inspect.signature(self.fill or self.rule).parameters.values():
            if one.kind is one.KEYWORD_ONLY and one.name not in GIVEN:
                kind, said = typing.get_args(one.annotation)
                default = dataclasses.MISSING if one.default is one.empty else one.default
                fields.append((one.name, kind, option(default, help=said.help, **said.bounds)))
        return dataclasses.make_dataclass(
            f"{self.name}_options", fields, bases=(CheckedOptions,), frozen=True
        )

    def needs(self, given: str) -> bool:
        """Whether its rule asks for `base`, `stage`, `key` or `note`."""
        return given in parameters_of(self.rule)

    def filled(self, options: Mapping[str, Any], count: int, stages: Sequence[str]) -> Options:
        """Given options with the defaults of all others: all that it takes to repeat the merge."""
        if self.fill is not None:
            return self.fill(count, stages, **options)
        return {
            field.name: options.get(field.name, field.default) for field in dataclasses.fields(self.options)
        }


# ---- weights ----------------------------------------------------------------------------------------------


def weighted(tensors: "Sequence[Tensor]", *, weights: Sequence[float] | None = None) -> "Tensor":
    """Weighted mean: θ = Σ wᵢ θᵢ with Σ wᵢ = 1.

    weights: one per expert, in any unit (2 1 1 means 0.5 0.25 0.25); default equal.
    An expert of weight 1 alone, and experts that are all equal, give that tensor bit for bit.
    Source: the weighted sum of sd-webui-supermerger; equal weights: Diffusion Soup, arXiv:2406.08431.
    """
    taking_part = [
        (tensor, share) for tensor, share in zip(tensors, shares(weights, len(tensors)), strict=True) if share
    ]
    first = taking_part[0][0]
    merged = first
    for tensor, share in taking_part[1:]:  # as differences, so that equal tensors change nothing
        merged = merged.add(tensor - first, alpha=share)
    return merged.clone() if merged is first else merged


def _shares(
    count: int,
    stages: Sequence[str],
    *,
    weights: Annotated[list[float] | None, Option("one number per expert, in any unit")] = None,
) -> Options:
    return {"weights": shares(weights, count)}


def slerp(
    tensors: "Sequence[Tensor]",
    *,
    t: Annotated[float, Option("position between the first expert (0) and the second (1)", **SHARE)] = 0.5,
) -> "Tensor":
    """Spherical interpolation of two tensors.

    t: from the first (0) to the second (1). The direction turns along the great circle, the norm changes
    linearly. Where there is no angle (equal directions) or no direction (a zero tensor, opposite ones) it is
    the straight line.
    Computed in float64, from the middle of the two directions: the angle is 2 atan2(|â - b̂|, |â + b̂|),
    whose digits are right next to parallel and opposite tensors too, where an arc cosine loses half of them.
    Source: Shoemake 1985, per tensor as the merging community does it (and sd-mecha).
    """
    one, other = tensors
    if one.equal(other):
        return one.clone()
    a, b = one.double(), other.double()
    lengths = a.norm(), b.norm()
    a, b = a / lengths[0], b / lengths[1]
    apart, together = (a - b).norm(), (a + b).norm()
    if not (apart > 0 and together > OPPOSITE):  # a zero tensor makes both NaN
        return weighted([one, other], weights=[1 - t, t])
    turned = 2 * apart.atan2(together) * (0.5 - t)  # from the middle
    direction = turned.cos() * (a + b) / together + turned.sin() * (a - b) / apart
    return (direction * lengths[0].lerp(lengths[1], t)).to(one.dtype)


# ---- differences ------------------------------------------------------------------------------------------


def add_difference(
    tensors: "Sequence[Tensor]",
    *,
    base: "Tensor",
    alpha: Annotated[float, Option("factor of the second expert's difference from the base")] = 1.0,
) -> "Tensor":
    """What the second expert learnt is added to the first: θ = A + alpha (B - base).

    alpha: how much of it; 1 is all.
    Source: AUTOMATIC1111's and supermerger's "add difference" (A, B, C).
    """
    first, second = tensors
    return first.add(second - base, alpha=alpha)


SCALE = Option("factor of the summed differences")


def task_arithmetic(
    tensors: "Sequence[Tensor]", *, base: "Tensor", scale: Annotated[float, SCALE] = 0.4
) -> "Tensor":
    """What all experts learnt is added to their base: θ = base + λ Σ dᵢ.

    scale: λ; 0.4 is what arXiv:2306.01708 takes when it is not tuned; 1/N gives the mean of N experts.
    Source: Ilharco et al., arXiv:2212.04089.
    """
    return base.add(sum_of(tensor - base for tensor in tensors), alpha=scale)


def ties(
    tensors: "Sequence[Tensor]",
    *,
    base: "Tensor",
    density: Annotated[
        float, Option("fraction of each tensor's differences that is kept, the largest ones", above=0, most=1)
    ] = 0.2,
    scale: Annotated[float, SCALE] = 1.0,
) -> "Tensor":
    """Trim, elect a sign, average what agrees: θ = base + λ mean of the survivors.

    density: which fraction of a tensor's differences is kept, the largest |dᵢ|. The elected sign is that of
    the sum of what was kept; only differences of that sign are averaged.
    scale: λ.
    Source: Yadav et al., arXiv:2306.01708, Algorithm 1, per tensor. Deviation: the paper ranks a whole
    model's differences at once; the community, and streaming, tensor by tensor.
    """
    import torch

    trimmed = torch.stack([_largest(tensor - base, density) for tensor in tensors])
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    mean = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return base.add(mean, alpha=scale)


def _largest(difference: "Tensor", density: float) -> "Tensor":
    """Zero all but that fraction of the largest magnitudes, at least one.

    Equals at the limit stay together, NaN stays.
    """
    keep = max(1, round(density * difference.numel()))
    magnitude = difference.abs()
    limit = magnitude.flatten().kthvalue(difference.numel() - keep + 1).values
    return difference.masked_fill(magnitude < limit, 0)  # a comparison with NaN is false, so it stays


def dare(
    tensors: "Sequence[Tensor]",
    *,
    base: "Tensor",
    key: str,
    drop: Annotated[float, Option("probability that a difference is dropped", least=0, below=1)] = 0.5,
    seed: Annotated[int, Option("seed of the random choice, 0 to 2**64 - 1", **SEED)] = 0,
    scale: Annotated[float, SCALE] = 0.4,
) -> "Tensor":
    """Drop differences at random, rescale the others, then task arithmetic: θ = base + λ Σ mᵢ dᵢ / (1 - p).

    drop: p, in [0, 1).
    seed: every expert and every key has a mask of its own, fixed by seed, key and the expert's place.
    scale: λ, as in task_arithmetic.
    Source: Yu et al., arXiv:2311.03099.
    """
    masked = (
        (tensor - base) * _kept(base, drop, f"{seed}:{key}:{place}") for place, tensor in enumerate(tensors)
    )
    return base.add(sum_of(masked), alpha=scale / (1 - drop))


def _kept(like: "Tensor", drop: float, name: str) -> "Tensor":
    """A mask of ones with probability 1 - drop; the same for the same name on every machine and device."""
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(like.shape, generator=generator) >= drop).to(like.device, like.dtype)


def model_stock(
    tensors: "Sequence[Tensor]", *, base: "Tensor", note: Callable[[], None] | None = None
) -> "Tensor":
    """The mean of the experts, drawn back to their base the more they disagree: θ = base + t · mean dᵢ.

    t = N cos / (1 + (N - 1) cos), cos: the mean cosine of all pairs of dᵢ, per tensor, in float64. Equal
    differences give t = 1, unrelated ones 0. Differences that cancel out (cos below 0) give the base; then
    note is called. A single expert gives itself.
    Source: Jang et al., arXiv:2403.19522, equation for N fine-tuned models.
    """
    import torch

    differences = [tensor - base for tensor in tensors]
    count = len(differences)
    flat = torch.stack([difference.flatten() for difference in differences]).double()
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=sys.float_info.min)
    cosines = flat @ flat.T
    pairs = count * (count - 1)
    cosine = ((cosines.sum() - cosines.trace()) / pairs).clamp(0, 1).item() if pairs else 1.0
    ratio = count * cosine / (1 + (count - 1) * cosine)
    if ratio == 0 and note is not None:
        note()
    return base.add(sum_of(differences) / count, alpha=ratio)


def sum_of(tensors: "Iterable[Tensor]") -> "Tensor":
    """The sum, without a copy of every summand at once."""
    return functools.reduce(lambda total, tensor: total + tensor, tensors)


# ---- what stands in the registry --------------------------------------------------------------------------

WEIGHTED = Merge(
    weighted,
    title="weighted merge",
    help="Σ wᵢ θᵢ with Σ wᵢ = 1; equal weights by default",
    row="one model of averaged weights",
    candidates=lambda count, stages: [{"weights": weights} for weights in one_ahead(count)],
    fill=_shares,
)
ADD_DIFFERENCE = Merge(
    add_difference,
    title="add difference",
    help="A + alpha (B - base)",
    row="the best expert plus what the second learnt",
    experts=2,
    candidates=lambda count, stages: [
        {"alpha": alpha, "order": order} for alpha in SCALES for order in ORDERS
    ],
)
TASK_ARITHMETIC = Merge(
    task_arithmetic,
    title="task arithmetic",
    help="base + scale Σ (θᵢ - base)",
    row="the base plus what all experts learnt",
    candidates=lambda count, stages: [{"scale": scale} for scale in (1 / count, *SCALES)],
)
TIES = Merge(
    ties,
    title="TIES",
    help="base + scale · the mean of the large differences that agree in sign",
    row="the same, trimmed and with elected signs",
    candidates=lambda count, stages: [
        {"scale": scale, "density": density} for density, scale in itertools.product((0.2, 0.5), (1.0, 0.5))
    ],
)
DARE = Merge(
    dare,
    title="DARE",
    help="task_arithmetic after differences are dropped at random",
    row="the same, differences dropped at random",
    candidates=lambda count, stages: [
        {"scale": scale, "drop": drop} for drop, scale in itertools.product((0.5, 0.9), (1 / count, 0.5))
    ],
)
MODEL_STOCK = Merge(
    model_stock,
    title="model stock",
    help="the mean, moved towards the base the more the experts disagree",
    row="the mean of the experts, drawn back to the base",
    float64=True,
)
SLERP = Merge(
    slerp,
    title="slerp",
    help="from A to B along a great circle (spherical interpolation)",
    row="the two best experts, interpolated on the sphere",
    experts=2,
    float64=True,
    candidates=lambda count, stages: [{"t": t, "order": "best first"} for t in (0.5, 0.3, 0.7)],
)
