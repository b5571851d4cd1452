"""What a training run will need, found out without its memory: one step on tensors that have shapes but no content."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.cost import call_of
from afa.memory import LiveBytes

COPIES = 2  # of what is trained, besides the optimiser's: the moving average, and the best so far


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on the training device. step: the most at once in a step, all else included. frozen: weights of experts.

    beside: weights of VAE and text encoders, which a cache makes superfluous.
    """

    step: int
    frozen: int
    beside: int

    @property
    def total(self) -> int:
        return self.step + self.beside


def step_bytes(denoiser: EnsembleDenoiser, batch_size: int, side: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """The most bytes of tensors alive in a training step of a denoiser like this one: weights, activations, gradients, optimiser.

    Counted on a copy under FakeTensorMode, which picks the same kernels as a real step, fused attention above all.
    side: of the latent. What an allocator adds by fragmentation is not in it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        copy = _copy(denoiser, dtype)
        if checkpointing:
            copy.enable_gradient_checkpointing()
        copy.train()
        with LiveBytes() as counter:
            _step(copy, list(copy.aggregators.parameters()), batch_size, side, dtype)
    return counter.peak


def _copy(denoiser: EnsembleDenoiser, dtype: torch.dtype) -> Any:
    """The same ensemble, made anew from configs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tensors without content cannot be cast in place
    try:
        experts = [type(expert).from_config(expert.config) for expert in denoiser.experts]
    finally:
        torch.set_default_dtype(before)
    return type(denoiser)(experts, denoiser.names, denoiser.recipe, denoiser.placement)


def _step(denoiser: Any, parameters: list[nn.Parameter], batch_size: int, side: int, dtype: torch.dtype) -> None:
    kept = [[parameter.detach().clone() for parameter in parameters] for _ in range(COPIES)]
    optimiser = torch.optim.AdamW(parameters)
    for _ in range(2):  # the optimiser makes its moments in the first
        call = call_of(denoiser, side, side, batch_size, dtype=dtype)
        denoiser(**call).sample.float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    del kept


def expected(denoiser: EnsembleDenoiser, beside: list[nn.Module], batch_size: int, side: int, dtype: torch.dtype, checkpointing: bool) -> Memory:
    """What training this ensemble's aggregators will need. beside: VAE and text encoders, as far as they stay in memory."""
    step = step_bytes(denoiser, batch_size, side, dtype, checkpointing)
    return Memory(step, sum(map(bytes_of, denoiser.experts)), sum(map(bytes_of, beside)))


def bytes_of(module: nn.Module) -> int:
    """Of a model's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters() if not parameter.is_meta)


def advice(memory: Memory, *, checkpointing: bool, dtype: torch.dtype, cached: bool, batch_size: int) -> list[str]:
    """What to switch on for less memory, what saves most first; none if all of it is on."""
    activations = memory.step - memory.frozen
    found = []
    if not checkpointing and activations > memory.frozen / 4:
        found.append("--gradient-checkpointing (activations of one stage instead of all)")
    if dtype == torch.float32:
        found.append("--dtype bfloat16 (half of the experts and of the activations)")
    if not cached and memory.beside:
        found.append(f"--cache DIR ({memory.beside / 1e9:.2f} GB of VAE and text encoders)")
    if batch_size > 1:
        found.append(f"--batch-size {batch_size // 2} --accumulate 2 (the same step in two parts)")
    return found
