"""Frozen weights that need less device memory: stored in 8 bits, or kept on the CPU until a layer needs them.

Only the weights of linear and convolutional layers are stored so; they are most of a model. A layer computes
as before, in the dtype of its input, with the weight fetched for the moment; the backward pass fetches it
again instead of keeping it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

STORES = ("int8", "fp8", "cpu")
LEAST = 4096  # numbers of a weight, below which nothing is gained
LARGEST = {"int8": 127.0, "fp8": 448.0}


class Kept:
    """One weight. fetch: as it was, but for the rounding to 8 bits, where it is wanted.

    In 8 bits every output channel has a scale of its own, so that its largest number is kept exactly.
    """

    def __init__(self, weight: Tensor, store: str) -> None:
        self.store, self.scale = store, None
        if store == "cpu":
            self.values = weight.detach().to("cpu", copy=True)
            if torch.cuda.is_available() and type(self.values) is Tensor:
                self.values = self.values.pin_memory()
            return
        largest = (
            weight.detach().float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-12)
        )
        self.scale = largest / LARGEST[store]
        scaled = weight.detach().float() / self.scale
        self.values = scaled.round().to(torch.int8) if store == "int8" else scaled.to(torch.float8_e4m3fn)

    def fetch(self, like: Tensor) -> Tensor:
        """In another tensor's dtype and on its device."""
        if self.scale is None:
            return self.values.to(like.device, like.dtype, non_blocking=True, copy=True)
        return self.values.to(like.dtype) * self.scale.to(like.dtype)

    def move(self, apply: Any) -> None:
        """Follow the layer to another device, where the store is one of the device."""
        if self.scale is not None:
            device = apply(torch.empty(0, device=self.values.device)).device
            self.values, self.scale = self.values.to(device), self.scale.to(device)

    @property
    def bytes(self) -> int:
        """On the device."""
        return 0 if self.scale is None else self.values.numel() + self.scale.numel() * 4


class _Linear(torch.autograd.Function):
    """x W' + b; the weight is frozen, and fetched twice rather than kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Kept, bias: Tensor | None) -> Tensor:
        ctx.kept = kept
        return F.linear(x, kept.fetch(x), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.kept.fetch(grads[0]), None, None


class _Conv2d(torch.autograd.Function):
    """The same for a convolution; how: stride, padding, dilation, groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Kept, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.kept, ctx.how, ctx.shape = kept, how, x.shape
        return F.conv2d(x, kept.fetch(x), bias, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return conv2d_input(ctx.shape, ctx.kept.fetch(grads[0]), grads[0], *ctx.how), None, None, None


class _Stored(nn.Module):
    """What stored layers share: the weight is no parameter any more, but can still be read."""

    kept: Kept
    _like: Tensor

    @property
    def weight(self) -> Tensor:
        """As it is computed with, in the dtype it came in."""
        return self.kept.fetch(self._like)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        self.kept.move(function)
        return super()._apply(function, recurse)  # type: ignore[no-untyped-call]


class StoredLinear(_Stored, nn.Linear):  # type: ignore[override]
    """A linear layer whose weight is kept elsewhere or smaller."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Linear.apply(x, self.kept, self.bias)  # type: ignore[no-untyped-call]
        return found


class StoredConv2d(_Stored, nn.Conv2d):  # type: ignore[override]
    """A convolution whose weight is kept elsewhere or smaller."""

    def forward(self, x: Tensor) -> Tensor:
        how = (self.stride, self.padding, self.dilation, self.groups)
        found: Tensor = _Conv2d.apply(x, self.kept, self.bias, how)  # type: ignore[no-untyped-call]
        return found


def store_weights(model: nn.Module, store: str) -> None:
    """Store the large weights of a frozen model, in place; it cannot be trained or saved afterwards.

    store: of STORES. A weight that several layers share is stored once, if they are stored in one call. LoRAs
    beside weights and padded convolutions of other kinds than zeros stay as they are. Raises ValueError for
    an unknown store.
    """
    if store not in STORES:
        raise ValueError(f"there is no store '{store}'. Known: {', '.join(STORES)}")
    stored: dict[
        int, Kept
    ] = {}  # by the weight's identity: all there are existed before, so that none is given twice
    layer: Any
    for layer in [layer for name, layer in model.named_modules() if "lora_" not in name]:
        large = (
            isinstance(layer, (nn.Linear, nn.Conv2d))
            and not isinstance(layer, _Stored)
            and layer.weight.numel() >= LEAST
        )
        if not large or (
            isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str))
        ):
            continue
        weight = layer.weight
        del layer._parameters["weight"]
        layer.__class__ = StoredLinear if isinstance(layer, nn.Linear) else StoredConv2d
        layer.kept = stored[id(weight)] = stored.get(id(weight)) or Kept(weight, store)
        layer.register_buffer(
            "_like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False
        )


def stored_bytes(model: nn.Module) -> int:
    """Of a model's weights on the device, however they are stored; what experts share counts once."""
    whole = sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if not parameter.is_meta
    )
    return whole + sum(
        kept.bytes for kept in {layer.kept for layer in model.modules() if isinstance(layer, _Stored)}
    )


def kept_elsewhere(model: nn.Module) -> list[Tensor]:
    """The weights of a model that lie in the memory of the CPU, whatever device it is on."""
    return [
        layer.kept.values
        for layer in model.modules()
        if isinstance(layer, _Stored) and layer.kept.store == "cpu"
    ]
