"""Frozen weights in less device memory: in 8 bits or fewer, in the CPU's memory until a layer needs them, or
each process with a part of them.

Only the weights of linear and convolutional layers are stored in this way; they are most of a model. A layer
computes as before, in the dtype of its input, with a weight that is fetched for this call. The backward pass
fetches it again instead of keeping it.

`delta1` and `delta2` are for experts that are near each other: the mean of all experts' weights in 8 bits,
and the difference of each expert from it in 1 or 2 bits, with one scale an output channel.
Sources: BitDelta, Liu et al., arXiv:2402.10193; the width of a step for normally distributed values: Max,
Quantizing for minimum distortion, 1960. Deviations from BitDelta: the difference is from the mean of the
experts in 8 bits, not from a base model; a scale a channel, not a matrix; scales are not trained.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.grad import conv2d_input

from afa.errors import UserError
from afa.experts.stored_weights import Ahead, EightBits, FewBits, OnCPU, OverProcesses, StoredWeight
from afa.settings import SHARDED, STORES

LEAST = 4096  # elements of a weight; storing a smaller one gains nothing
NEAR = 0.1  # distance from the mean, relative: with .07 little is lost, with .15 much (docs/performance.md)
DIFFERENCES = {"delta1": 1, "delta2": 2}  # store -> bits of a difference


class _Linear(torch.autograd.Function):
    """x Wᵀ + b with a frozen weight, which is fetched for each pass and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.kept = kept
        return F.linear(x, kept.fetch(x), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.kept.fetch(grads[0]), None, None


class _Conv2d(torch.autograd.Function):
    """The same for a convolution. how: stride, padding, dilation, groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: StoredWeight, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.kept, ctx.how, ctx.shape = kept, how, x.shape
        return F.conv2d(x, kept.fetch(x), bias, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return conv2d_input(ctx.shape, ctx.kept.fetch(grads[0]), grads[0], *ctx.how), None, None, None


class _Stored(nn.Module):
    """A layer whose weight is stored: no parameter any more, but it can still be read."""

    kept: StoredWeight
    _like: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, in its original dtype."""
        return self.kept.fetch(self._like)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        self.kept.move(function(torch.empty(0, device=self._like.device)).device)
        return super()._apply(function, recurse)  # type: ignore[no-untyped-call]


class StoredLinear(_Stored, nn.Linear):  # type: ignore[override]
    """A linear layer whose weight is stored."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Linear.apply(x, self.kept, self.bias)  # type: ignore[no-untyped-call]
        return found


class StoredConv2d(_Stored, nn.Conv2d):  # type: ignore[override]
    """A convolution whose weight is stored."""

    def forward(self, x: Tensor) -> Tensor:
        how = (self.stride, self.padding, self.dilation, self.groups)
        found: Tensor = _Conv2d.apply(x, self.kept, self.bias, how)  # type: ignore[no-untyped-call]
        return found


def check_store(store: str | None, device: torch.device) -> None:
    """Raise UserError for --store cpu where the experts would run on the CPU, and sharded in one process."""
    if store == SHARDED and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        raise UserError(
            "--store sharded needs several processes on a machine, such as: "
            "torchrun --nproc_per_node 2 -m afa train …"
        )
    if store == "cpu" and device.type == "cpu":
        raise UserError(
            "--store cpu keeps experts beside a GPU, and they would run on the CPU; leave it out, "
            "or use --store int8"
        )


def store_weights(model: nn.Module, store: str) -> None:
    """Store the large weights of frozen experts, in place. They cannot be trained or saved afterwards.

    A weight that several layers share is stored once. LoRAs beside weights, and convolutions with padding
    other than zeros, stay as they are.

    model: an expert, or a ModuleList of several
    store: one of STORES, or SHARDED; delta1 and delta2 need several experts of one architecture
    Raises ValueError for an unknown store, UserError for experts that cannot be stored in this way.
    """
    if store not in (*STORES, SHARDED):
        raise ValueError(f"there is no store '{store}'. Known: {', '.join(STORES)}")
    experts = list(model) if isinstance(model, nn.ModuleList) else [model]
    layers = [_large_layers(expert) for expert in experts]
    # by id; all weights exist before the first is stored, so no id recurs
    stored = _differences(layers, store) if store in DIFFERENCES else {}
    makers: dict[str, Callable[[Tensor], StoredWeight]] = {
        "cpu": functools.partial(OnCPU, ahead=Ahead()),
        SHARDED: OverProcesses,
    }
    make = makers.get(store, functools.partial(EightBits, kind=store))
    for layer in [layer for own in layers for layer in own.values()]:
        weight = layer.weight
        if id(weight) not in stored:
            stored[id(weight)] = make(weight)
        del layer._parameters["weight"]
        layer.__class__ = StoredLinear if isinstance(layer, nn.Linear) else StoredConv2d
        layer.kept = stored[id(weight)]
        layer.register_buffer(
            "_like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False
        )


def _differences(experts: Sequence[dict[str, Any]], store: str) -> dict[int, StoredWeight]:
    """Store the weights of layers with equal names together: id of a weight -> stored weight."""
    _check_alike(experts, store)
    stored: dict[int, StoredWeight] = {}
    between = size = torch.zeros(())  # squared: of the differences, and of the weights
    for name in experts[0]:
        weights = {id(layers[name].weight): layers[name].weight for layers in experts}
        middle = EightBits(torch.stack([weight.float() for weight in weights.values()]).mean(0), "int8")
        for key, weight in weights.items():
            alone = len(weights) == 1  # the same tensor in all experts
            stored[key] = middle if alone else FewBits(weight, middle, DIFFERENCES[store])
            between = between + (weight.float() - middle.fetch(weight.float())).square().sum().cpu()
            size = size + weight.float().square().sum().cpu()
    if not isinstance(size, FakeTensor) and not size.is_meta:
        _warn_of_distance(float((between / size.clamp(min=1e-12)).sqrt()), store)
    return stored


def _warn_of_distance(distance: float, store: str) -> None:
    """Say if experts are too far from each other for few bits. distance: from their mean, relative"""
    if distance > NEAR:
        print(
            f"afa: the experts' weights differ from their mean by {distance:.2f} of their size, and --store "
            f"{store} is for experts within {NEAR}, as fine-tunes of one base are; --store int8 is safe",
            file=sys.stderr,
        )


def _large_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers whose weights are stored, by their names without LoRAs."""
    return {
        name.replace(".base_layer", ""): layer
        for name, layer in model.named_modules()
        if "lora_" not in name
        and isinstance(layer, (nn.Linear, nn.Conv2d))
        and not isinstance(layer, _Stored)
        and layer.weight.numel() >= LEAST
        and not (
            isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str))
        )
    }


def _check_alike(experts: Sequence[dict[str, Any]], store: str) -> None:
    """Raise UserError if there are no several experts with the same layers."""
    shapes = [{name: layer.weight.shape for name, layer in layers.items()} for layers in experts]
    if len(experts) < 2 or any(other != shapes[0] for other in shapes[1:]):
        what = "one expert" if len(experts) < 2 else "experts of different architectures"
        raise UserError(
            f"--store {store} stores the differences of experts of one architecture, and here is {what}; "
            "use --store int8"
        )


def _kept(model: nn.Module) -> set[StoredWeight]:
    return {layer.kept for layer in model.modules() if isinstance(layer, _Stored)}


def kept_tensors(model: nn.Module) -> list[Tensor]:
    """Return what stored weights keep on the device, each tensor once."""
    return list({id(tensor): tensor for kept in _kept(model) for tensor in kept.tensors}.values())


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights on the device, as they are stored. Shared ones count once."""
    parameters = [parameter for parameter in model.parameters() if not parameter.is_meta]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *kept_tensors(model)))


def kept_elsewhere(model: nn.Module) -> list[Tensor]:
    """Return the weights of a model that are stored in the CPU's memory."""
    return [kept.values for kept in _kept(model) if isinstance(kept, OnCPU)]
