"""Ways in which a frozen weight is kept until its layer needs it. See afa.experts.quantised."""

import functools
import os
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LARGEST = {"int8": 127.0, "fp8": 448.0}
STEPS = {1: 1.596, 2: 0.9957}  # bits of a difference -> width of a step, in standard deviations


class StoredWeight(ABC):
    """One stored weight, which fetch returns, rounded as the store has it."""

    @abstractmethod
    def fetch(self, like: Tensor) -> Tensor:
        """Return the weight in the dtype and on the device of another tensor."""

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps on the layer's device."""
        return []

    def move(self, device: torch.device) -> None:  # noqa: B027 (nothing to move is no mistake)
        """Move what it keeps on the layer's device to another one."""


class OnCPU(StoredWeight):
    """A weight in the CPU's memory. ahead: copies the next one meanwhile; all weights of a model share it"""

    def __init__(self, weight: Tensor, ahead: "Ahead | None" = None) -> None:
        self.values, self.ahead = weight.detach().to("cpu", copy=True), ahead
        if torch.cuda.is_available() and type(self.values) is Tensor:
            self.values = self.values.pin_memory()

    def fetch(self, like: Tensor) -> Tensor:
        eager = like.is_cuda and not torch.compiler.is_compiling()
        if self.ahead is None or not eager or torch.cuda.is_current_stream_capturing():
            return self.copy(like)
        return self.ahead.fetch(self, like)

    def copy(self, like: Tensor) -> Tensor:
        """Copy the weight to the device of another tensor, in its dtype, on the current stream."""
        return self.values.to(like.device, like.dtype, non_blocking=True, copy=True)


class Ahead:
    """Copies the weight that is needed next on a stream of its own, while the device computes with this one.

    Which one is next is what followed when the last two were needed in this order before: the backward pass
    comes the other way. One weight is under way at a time.
    """

    def __init__(self) -> None:
        self._following: dict[tuple[OnCPU | None, OnCPU | None], OnCPU] = {}
        self._last: tuple[OnCPU | None, OnCPU | None] = (None, None)
        self._under_way: tuple[OnCPU, Tensor, Any] | None = None
        self._stream: Any = None

    def fetch(self, kept: OnCPU, like: Tensor) -> Tensor:
        """Return a weight on the device, and begin to copy the one that followed it before."""
        self._following[self._last] = kept
        self._last = (self._last[1], kept)
        found = self._arrived(kept, like)
        if found is None:
            found = kept.copy(like)
        following = self._following.get(self._last)
        if following is not None and (self._under_way is None or self._under_way[0] is not following):
            self._under_way = (following, *self._beside(following, like))
        return found

    def _arrived(self, kept: OnCPU, like: Tensor) -> Tensor | None:
        """Take the weight that is under way, if it is this one as it is needed now."""
        if self._under_way is None or self._under_way[0] is not kept:
            return None
        _, found, done = self._under_way
        self._under_way = None
        if (found.device, found.dtype) != (like.device, like.dtype):
            return None
        if done is not None:
            now = torch.cuda.current_stream(like.device)
            now.wait_event(done)
            found.record_stream(now)  # else its memory might be given away while the layer computes
        return found

    def _beside(self, kept: OnCPU, like: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy a weight: -> it, and the event at which it is there; None: it is there already."""
        if not like.is_cuda:
            return kept.copy(like), None
        self._stream = self._stream or torch.cuda.Stream(like.device)
        with torch.cuda.stream(self._stream):
            found = kept.copy(like)
            return found, self._stream.record_event()


class OverProcesses(StoredWeight):
    """A weight of which each process of a machine keeps a part; a fetch gathers it from them.

    So all of them must run the same layers.
    """

    def __init__(self, weight: Tensor) -> None:
        rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        self.shape, self.stride = weight.shape, weight.contiguous().stride()
        parts = weight.detach().contiguous().chunk(count)
        empty = weight.detach().new_empty(0, *weight.shape[1:])
        self.values = parts[rank].clone() if rank < len(parts) else empty

    def fetch(self, like: Tensor) -> Tensor:
        if self.values.is_meta or isinstance(self.values, FakeTensor):
            return like.new_empty(self.shape)
        from torch.distributed.tensor import DTensor, Shard

        mesh = _mesh(self.values.device.type)
        part = DTensor.from_local(self.values, mesh, [Shard(0)], shape=self.shape, stride=self.stride)
        return part.full_tensor().to(like.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values]

    def move(self, device: torch.device) -> None:
        self.values = self.values.to(device)


@functools.cache
def _mesh(kind: str) -> Any:
    """The processes of this machine, as DTensor has them. kind: of their devices"""
    from torch.distributed.device_mesh import init_device_mesh

    each, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), dist.get_world_size()
    shape, names = (everywhere // each, each), ("machines", "devices")
    return init_device_mesh(kind, shape, mesh_dim_names=names)["devices"]


class EightBits(StoredWeight):
    """A weight in 8 bits. Each output channel has a scale, so that its largest value is exact.

    kind: int8 or fp8
    """

    def __init__(self, weight: Tensor, kind: str) -> None:
        channels = tuple(range(1, weight.ndim))
        largest = weight.detach().float().abs().amax(channels, keepdim=True).clamp(min=1e-12)
        self.scale = largest / LARGEST[kind]
        scaled = weight.detach().float() / self.scale
        self.values = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)

    def fetch(self, like: Tensor) -> Tensor:
        if self.values.dtype == torch.int8:
            return self.values * self.scale.to(like.dtype)  # promoted in the same pass over memory
        return self.values.to(like.dtype) * self.scale.to(like.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values, self.scale]

    def move(self, device: torch.device) -> None:
        self.values, self.scale = self.values.to(device), self.scale.to(device)


class FewBits(StoredWeight):
    """A weight as its difference from a stored one, in 1 or 2 bits with a scale for each output channel.

    middle: the stored weight in int8, shared by all experts
    """

    def __init__(self, weight: Tensor, middle: EightBits, bits: int) -> None:
        self.middle, self.bits, self.shape = middle, bits, weight.shape
        difference = weight.detach().float() - middle.fetch(weight.float())
        channels = tuple(range(1, weight.ndim))
        self.scale = difference.square().mean(channels, keepdim=True).sqrt().clamp(min=1e-12) * STEPS[bits]
        levels = 2**bits
        values = (difference / self.scale + levels / 2).floor().clamp(0, levels - 1).to(torch.uint8).flatten()
        values = F.pad(values, (0, -values.numel() % self.in_a_byte)).view(-1, self.in_a_byte)
        self.values = (values << self._places(values)).sum(1, dtype=torch.uint8)

    @property
    def in_a_byte(self) -> int:
        """How many differences a byte holds."""
        return 8 // self.bits

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(0, 8, self.bits, dtype=torch.uint8, device=like.device)

    def fetch(self, like: Tensor) -> Tensor:
        levels = 2**self.bits
        values = (self.values.unsqueeze(1) >> self._places(self.values)) & (levels - 1)
        values = values.flatten()[: self.shape.numel()].view(self.shape)
        scale, middle = self.scale.to(like.dtype), self.middle
        # Both products take whole numbers as they are, in one pass over memory each.
        fetched = torch.addcmul(scale * ((1 - levels) / 2), middle.values, middle.scale.to(like.dtype))
        return torch.addcmul(fetched, values, scale)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.middle.tensors, self.values, self.scale]

    def move(self, device: torch.device) -> None:
        self.middle.move(device)
        self.values, self.scale = self.values.to(device), self.scale.to(device)
