"""Files shared as LoRAs that hold other differences of weights: LoHa, LoKr, DoRA, whole differences.

An adapter beside a layer cannot hold these; they become part of an expert's weights, in float32, and such an
expert shares no weights with others. By layer, with rank r and scale = alpha / r:
* LoHa:  ΔW = (w1_a w1_b) ∘ (w2_a w2_b) · scale; with a core t of a convolution, a factor is t ×₁ w_a ×₂ w_b
* LoKr:  ΔW = w1 ⊗ w2 · scale, each whole (without scale if both are), or as the product of _a and _b
* LoCon: ΔW = up mid down · scale, mid being the core of a convolution
* DoRA:  W' = m (W + ΔW) / ‖W + ΔW‖, the norms by row or by column, as the shape of m (dora_scale) says
* diff, diff_b: ΔW and Δb themselves
A file's strength s multiplies ΔW; of a DoRA it gives (1 - s) W + s W'.
Sources: LyCORIS, Yeh et al., arXiv:2309.14859, and its implementation; DoRA, Liu et al., arXiv:2402.09353.
Deviation: for norms by row, ComfyUI divides by the norms of W; here, as in training, by those of W + ΔW.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afa.denoiser.lora_layers import DIFFERENCES, Names, one_number, place_of
from afa.errors import UserError
from afa.experts.headers import is_finite
from afa.experts.lora import add_own, fuse, holds_differences, lora_parts, read_lora
from afa.experts.spec import Lora
from afa.models.registry import layers_of
from afa.stages.original_names import Layers

if TYPE_CHECKING:
    from afa.experts.expert import Expert

ROLES = {"lora_A": "lora_down", "lora_B": "lora_up"}
PART = re.compile(
    rf"(.+)\.({DIFFERENCES}|alpha|lora_(?:up|down|A|B))(?:\.weight)?"
)  # layer's name in a file, and which of its tensors
NEEDED = (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lora_up", "lora_down"))


@dataclass
class Difference:
    """What a file holds of one of its layers, which may be several layers of diffusers'.

    layers:  of the model
    modules: these layers, with or without numbers
    where:   the file and the layer's name in it, for messages
    tensors: by their role: hada_w1_a, lokr_w1, lora_up, diff …
    """

    layers: Layers
    modules: Sequence[Any]
    where: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def by_column(self) -> bool:
        """Whether it is a DoRA whose norms go over the rows of all its layers."""
        scale = self.tensors.get("dora_scale")
        return scale is not None and scale.shape[0] != self.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights of its layers, one below the other."""
        shapes = [module.weight.shape for module in self.modules]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def weight(self, weights: Sequence[Tensor], strength: float) -> list[Tensor]:
        """Its layers' weights with the difference, in float32.

        weights: of its layers, in their order
        Raises UserError for tensors that do not fit each other or the layers.
        """
        delta = self._rows(self._delta())
        if delta is None and "dora_scale" not in self.tensors:
            return list(weights)
        old = torch.cat([weight.float() for weight in weights])
        if "dora_scale" in self.tensors:
            new = self._decomposed(old if delta is None else old + delta)
            new = new if strength == 1 else old.lerp(new, strength)
        else:
            assert delta is not None
            new = old + strength * delta
        return list(new.split([len(weight) for weight in weights]))

    def bias(self, biases: Sequence[Tensor], strength: float) -> list[Tensor]:
        """Its layers' biases with the difference, in float32."""
        delta = self._rows(self.tensors["diff_b"].float().flatten())
        assert delta is not None
        return list(
            (torch.cat(list(biases)).float() + strength * delta).split([len(bias) for bias in biases])
        )

    def of_one(self, place: int, tensors: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        """One layer's own weight and bias with the difference, in float32.

        place: of the layer among its layers
        Raises UserError for a DoRA whose norms go over all its layers, of which this one is not all.
        """
        if self.by_column and len(self.modules) > 1:
            raise UserError(
                f"{self.where} is a DoRA with norms over {len(self.modules)} layers, which a merge does not "
                "read; give the merge another expert, or write this one as a folder with a plain LoRA"
            )
        sizes = [len(module.weight) for module in self.modules]
        found = dict(tensors)
        for end, change in self.changes().items():
            whole = [
                tensors[end] if place == other else torch.zeros(size, *tensors[end].shape[1:])
                for other, size in enumerate(sizes)
            ]
            found[end] = change(whole, strength)[place]
        return found

    def changes(self) -> dict[str, Callable[[Sequence[Tensor], float], list[Tensor]]]:
        """weight, and bias if it has one -> the function that changes it."""
        return {"weight": self.weight} | ({"bias": self.bias} if "diff_b" in self.tensors else {})

    def check(self) -> None:
        """Raise UserError if it is incomplete, or does not fit its layers."""
        found = set(self.tensors)
        lacks = [name for names in NEEDED if found & set(names) for name in names if name not in found]
        if any(name.startswith("lokr") for name in found):
            for one in ("lokr_w1", "lokr_w2"):
                lacks += [] if {one} & found or {f"{one}_a", f"{one}_b"} <= found else [one]
        if lacks:
            raise UserError(f"{self.where} lacks {lacks[0]}; it is incomplete: download or export it again")
        with torch.device("meta"):
            like = Difference(
                self.layers,
                self.modules,
                self.where,
                {name: one.to("meta") for name, one in self.tensors.items()},
            )
            like.weight([torch.empty(module.weight.shape) for module in self.modules], 1.0)
        biases = [module.bias for module in self.modules]
        if "diff_b" in found and (
            None in biases or self.tensors["diff_b"].numel() != sum(len(bias) for bias in biases)
        ):
            raise UserError(f"{self.where} has a bias (diff_b) that its layer does not have; {ANOTHER}")

    def _rows(self, rows: Tensor | None) -> Tensor | None:
        """In diffusers' order of halves."""
        return torch.cat(rows.chunk(2)[::-1]) if rows is not None and self.layers.swapped else rows

    def _delta(self) -> Tensor | None:
        """ΔW in the shape of the weight; None if the file has only a bias or a magnitude."""
        own = {name: tensor.float() for name, tensor in self.tensors.items()}
        try:
            found = _delta(own, self.scale)
            if found is not None and len(found) != self.shape[0]:
                raise ValueError
            return None if found is None else found.reshape(self.shape)
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in own.items() if tensor.ndim)
            raise UserError(f"{self.where} ({shapes}) does not make {self.shape}; {ANOTHER}") from error

    def scale(self, rank: int) -> float:
        """alpha / rank; 1 without alpha."""
        alpha = self.tensors.get("alpha")
        return 1.0 if alpha is None else one_number(alpha, f"{self.where}: its alpha") / rank

    def _decomposed(self, new: Tensor) -> Tensor:
        """The weight with the magnitudes of a DoRA."""
        scale, tiny = self.tensors["dora_scale"].float(), torch.finfo(torch.float32).eps
        axis = 1 if self.by_column else 0
        if scale.numel() != new.shape[axis]:
            raise UserError(
                f"{self.where}: dora_scale {tuple(scale.shape)} does not fit {self.shape}; {ANOTHER}"
            )
        others = [place for place in range(new.ndim) if place != axis]
        side = [1] * new.ndim
        side[axis] = -1
        magnitude = scale.reshape(side)
        if axis == 0 and self.layers.swapped:
            magnitude = torch.cat(magnitude.chunk(2)[::-1])
        return new * (magnitude / (torch.linalg.vector_norm(new, dim=others, keepdim=True) + tiny))


ANOTHER = "it was made for another architecture"


def _delta(own: Mapping[str, Tensor], scale: Callable[[int], float]) -> Tensor | None:
    """ΔW by the formulas above, in some shape. Raises RuntimeError for tensors that do not fit each other."""
    if "hada_w1_a" in own:
        one, other = (
            _core(own[f"hada_t{n}"], own[f"hada_w{n}_a"], own[f"hada_w{n}_b"])
            if f"hada_t{n}" in own
            else own[f"hada_w{n}_a"] @ own[f"hada_w{n}_b"]
            for n in (1, 2)
        )
        return one * other * scale(own["hada_w1_b"].shape[0])
    if any(name.startswith("lokr") for name in own):
        factors = [
            own[f"lokr_w{n}"]
            if f"lokr_w{n}" in own
            else _core(own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
            if n == 2 and "lokr_t2" in own
            else own[f"lokr_w{n}_a"] @ own[f"lokr_w{n}_b"]
            for n in (1, 2)
        ]
        ranks = [own[f"lokr_w{n}_b"].shape[0] for n in (2, 1) if f"lokr_w{n}" not in own]
        one, other = factors
        one = one.reshape(*one.shape, *[1] * (other.ndim - one.ndim))
        return torch.kron(one, other.contiguous()) * (scale(ranks[0]) if ranks else 1.0)
    if "lora_up" in own:
        up, down = own["lora_up"].flatten(1), own["lora_down"]
        if "lora_mid" in own:
            return torch.einsum("or,rskl,si->oikl", up, own["lora_mid"], down.flatten(1)) * scale(len(down))
        return up @ down.flatten(1) * scale(len(down))
    return own.get("diff")


def _core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def find_differences(
    tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Module], what: str, where: str
) -> list[tuple[str, Difference]]:
    """What a file holds, by part of a pipeline.

    tensors:     key in the file -> tensor
    parts:       name in a pipeline -> model: the denoiser first
    what, where: the file and the expert, for messages
    Raises UserError for a file that is incomplete, does not fit, or holds anything else.
    """
    names = {part: Names(module, layers_of) for part, module in parts.items()}
    found: dict[str, tuple[str, Difference]] = {}
    for key, tensor in tensors.items():
        match = PART.fullmatch(key)
        place = place_of(match[1], names) if match else None
        if match is None or place is None:
            raise UserError(f"{what} does not fit {where}: {key} found no place; {ANOTHER}")
        part, layers = place
        if match[1] not in found:
            modules = [names[part].layers[name] for name in layers.names]
            found[match[1]] = part, Difference(layers, modules, f"{what}: {match[1]}")
        found[match[1]][1].tensors[ROLES.get(match[2], match[2])] = tensor
    for _, difference in found.values():
        difference.check()
    return list(found.values())


def fold_in(expert: "Expert", loras: Sequence[Lora]) -> None:
    """Make LoRA files, and files of other differences, part of an expert's weights, in their order.

    Raises UserError for a file that is broken or does not fit, and for weights that do not fit the expert's
    dtype with it.
    """
    parts = lora_parts(expert)
    if not any(holds_differences(lora) for lora in loras):
        add_own(expert, loras)
        for module in parts.values():
            fuse(module)
        return
    for lora in loras:
        if not holds_differences(lora):
            add_own(expert, [lora])
            for module in parts.values():
                fuse(module)
            continue
        what, tensors, _ = read_lora(lora.path)
        for _, difference in find_differences(tensors, parts, what, f"expert '{expert.name}'"):
            _change(difference, lora.strength)


@torch.no_grad()
def _change(difference: Difference, strength: float) -> None:
    """Change a model's layers in place."""
    for end, change in difference.changes().items():
        old = [getattr(module, end) for module in difference.modules]
        for parameter, new in zip(old, change([one.data for one in old], strength), strict=True):
            converted = new.to(parameter.dtype)
            if not is_finite(converted):
                raise UserError(
                    f"{difference.where}: its {end} does not fit {parameter.dtype}; load the experts in "
                    "float32, or make the LoRA weaker"
                )
            parameter.data = converted.clone()
