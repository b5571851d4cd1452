"""Frozen weights in less device memory: in 8 bits, or in the CPU's memory until a layer needs them.

Only the weights of linear and convolutional layers are stored in this way; they are most of a model. A layer
computes as before, in the dtype of its input, with a weight that is fetched for this call. The backward pass
fetches it again instead of keeping it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from afa.errors import UserError
from afa.settings import STORES

LEAST = 4096  # elements of a weight; storing a smaller one gains nothing
LARGEST = {"int8": 127.0, "fp8": 448.0}


class StoredWeight:
    """One stored weight, which fetch returns, rounded to 8 bits if it is stored so.

    weight: of a layer
    store:  int8, fp8 or cpu. In 8 bits each output channel has a scale, so that its largest value is exact
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
        """The weight in the dtype and on the device of another tensor."""
        if self.scale is None:
            return self.values.to(like.device, like.dtype, non_blocking=True, copy=True)
        return self.values.to(like.dtype) * self.scale.to(like.dtype)

    def move(self, apply: Any) -> None:
        """Move 8-bit values to another device with the layer. apply: what nn.Module._apply got."""
        if self.scale is not None:
            device = apply(torch.empty(0, device=self.values.device)).device
            self.values, self.scale = self.values.to(device), self.scale.to(device)

    @property
    def bytes(self) -> int:
        """The bytes that it takes on the device."""
        return 0 if self.scale is None else self.values.numel() + self.scale.numel() * 4


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
        self.kept.move(function)
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
    """Raise UserError for --store cpu where the experts would run on the CPU."""
    if store == "cpu" and device.type == "cpu":
        raise UserError(
            "--store cpu keeps experts beside a GPU, and they would run on the CPU; leave it out, "
            "or use --store int8"
        )


def store_weights(model: nn.Module, store: str) -> None:
    """Store the large weights of a frozen model, in place. It cannot be trained or saved afterwards.

    A weight that several layers share is stored once. LoRAs beside weights, and convolutions with padding
    other than zeros, stay as they are.

    store: one of STORES
    Raises ValueError for an unknown store.
    """
    if store not in STORES:
        raise ValueError(f"there is no store '{store}'. Known: {', '.join(STORES)}")
    stored: dict[
        int, StoredWeight
    ] = {}  # by id; all weights exist before the first is stored, so no id recurs
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
        layer.kept = stored[id(weight)] = stored.get(id(weight)) or StoredWeight(weight, store)
        layer.register_buffer(
            "_like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False
        )


def stored_bytes(model: nn.Module) -> int:
    """The bytes of a model's weights on the device, however they are stored. Shared weights count once."""
    whole = sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if not parameter.is_meta
    )
    return whole + sum(
        kept.bytes for kept in {layer.kept for layer in model.modules() if isinstance(layer, _Stored)}
    )


def kept_elsewhere(model: nn.Module) -> list[Tensor]:
    """The weights of a model that are stored in the CPU's memory."""
    return [
        layer.kept.values
        for layer in model.modules()
        if isinstance(layer, _Stored) and layer.kept.store == "cpu"
    ]
