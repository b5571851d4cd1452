"""Numbers that are none (NaN, infinite) among weights: found after loading, in one pass."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from afa.errors import UserError

CHUNK = 1 << 24  # numbers that are converted at once, where torch compares no dtype of that kind


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. Its extremes are compared: a NaN anywhere becomes both of them."""
    if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # 8-bit floats
        return all(is_finite(part.float()) for part in tensor.detach().flatten().split(CHUNK))
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if there is none."""
    return next((name for name, tensor in named if not is_finite(tensor)), None)


def check_finite(module: nn.Module, where: str) -> None:
    """Raises UserError, with the tensor's name, for a model whose weights hold NaN or infinity.

    where: whose model it is, for the message
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    name = first_not_finite(tensors.items())
    if name is None:
        return
    half = tensors[name].dtype == torch.float16
    fit = ", or what it holds does not fit float16: try bfloat16 or float32" if half else ""
    raise UserError(f"{where}: {name} is not finite (NaN or infinite numbers); the file is broken: download or export it again{fit}")
