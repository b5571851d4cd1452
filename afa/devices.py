"""The device to compute on, and how much memory a piece of work takes."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afa.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name, or the best one for None. Raises UserError if it cannot be used."""
    if name is None:
        from accelerate import PartialState

        return PartialState().default_device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # all mean a missing backend
        raise UserError(
            f"--device {name} cannot be used here: {str(error).strip().splitlines()[0]}"
        ) from None
    return device


def process_device(name: str | None) -> torch.device:
    """Return the device of that name, or the best one for None; each of several processes has its own.

    The first call initialises accelerate, which decides how processes communicate.
    Raises UserError if the device cannot be used.
    """
    from accelerate import PartialState

    cpu = name == "cpu" or (name is None and not torch.accelerator.is_available())
    # Others may wait for hours while one process searches for weights, judges or draws.
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    device = choose_device(name)
    # not accelerate's cpu:0, to which everything would be copied
    return state.device if state.num_processes > 1 and not cpu else device


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return None


def free_memory() -> None:
    """Free models that are no longer referenced: they hold themselves by cycles, and garbage is rare."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class LiveBytes(TorchDispatchMode):
    """Inside the context, count the bytes of all tensors that are alive, on all devices together.

    ignored: tensors that are not counted
    peak:    largest number of bytes alive at once
    Older tensors, such as parameters, are counted from the first operation that reads them.
    """

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for value in _tensors((*args, *kwargs.values(), result)):
            if value.device.type != "meta":
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operation's values, which it nests in lists and tuples only."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def peak_megabytes(work: Callable[[], Any]) -> float:
    """Run some work and return the peak size of all tensors that it uses, in megabytes (10**6 bytes)."""
    with LiveBytes() as counter:
        work()
    return counter.peak / 1e6
