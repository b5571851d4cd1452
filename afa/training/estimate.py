"""What a training run will need, found out without its memory: one step on tensors that have shapes but no content."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.cost import call_of
from afa.denoiser.sharing import base_of, shared_copy
from afa.experts.adapters import tuner_layers
from afa.experts.storage import kept_elsewhere, store_weights, stored_bytes
from afa.memory import LiveBytes
from afa.training.objectives.decode import Decoder

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


def step_bytes(
    denoiser: EnsembleDenoiser, batch_size: int, side: int, dtype: torch.dtype, checkpointing: bool, store: str | None = None, vae: Any = None
) -> int:
    """The most bytes of tensors alive in a training step of a denoiser like this one: weights, activations, gradients, optimiser.

    Counted on a copy under FakeTensorMode, which picks the same kernels as a real step, fused attention above all.
    side: of the latent. store: see afa.experts.storage. vae: where an objective judges images, drawn through it.
    What an allocator adds by fragmentation is not in it, nor a reward's own network.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = _copy(denoiser, dtype)
        if checkpointing:
            twin.enable_gradient_checkpointing()
        twin.train()
        decoder = None if vae is None else Decoder(_made(vae, dtype), checkpointing)
        elsewhere: list[torch.Tensor] = []
        if store is not None:
            store_weights(twin.experts, store)
            elsewhere = kept_elsewhere(twin.experts)
        with LiveBytes(elsewhere) as counter:
            _step(twin, list(twin.aggregators.parameters()), batch_size, side, dtype, decoder)
    return counter.peak


def _copy(denoiser: EnsembleDenoiser, dtype: torch.dtype) -> Any:
    """The same ensemble, made anew from configs; what experts share is made once, and their LoRAs beside it."""
    bases: dict[int, Any] = {}
    for expert in denoiser.experts:
        if base_of(expert) not in bases:
            bases[base_of(expert)] = _made(expert, dtype)
    experts = [_with_loras(shared_copy(bases[base_of(expert)]), expert, dtype) for expert in denoiser.experts]
    return type(denoiser)(experts, denoiser.names, denoiser.recipe, denoiser.placement)


def _with_loras(model: Any, expert: Any, dtype: torch.dtype) -> Any:
    """A model without LoRAs, with empty ones beside its weights where an expert has some."""
    for name, layer in tuner_layers(expert):
        known: dict[int, Any] = {id(layer.base_layer): model.get_submodule(name)}
        for path, weight in layer.named_parameters():
            if not path.startswith("base_layer."):
                known[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=False)
        model.set_submodule(name, copy.deepcopy(layer, known))
    return model


def _made(model: Any, dtype: torch.dtype) -> Any:
    """A model of the same config."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tensors without content cannot be cast in place
    try:
        return type(model).from_config(model.config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _step(denoiser: Any, parameters: list[nn.Parameter], batch_size: int, side: int, dtype: torch.dtype, decoder: Decoder | None) -> None:
    kept = [[parameter.detach().clone() for parameter in parameters] for _ in range(COPIES)]
    optimiser = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()  # makes its moments, which every later step finds
    optimiser.zero_grad()
    for parameter in denoiser.parameters():
        parameter.view(-1)  # counted from the start: in every later step all weights are there
    call = call_of(denoiser, side, side, batch_size, dtype=dtype)
    answer = denoiser(**call).sample.float()
    (answer if decoder is None else decoder(answer)).square().mean().backward()
    optimiser.step()
    del kept


def expected(
    denoiser: EnsembleDenoiser, beside: list[nn.Module], batch_size: int, side: int, dtype: torch.dtype, checkpointing: bool,
    store: str | None = None, vae: Any = None,
) -> Memory:  # fmt: skip
    """What training this ensemble's aggregators will need. beside: VAE and text encoders, as far as they stay in memory."""
    step = step_bytes(denoiser, batch_size, side, dtype, checkpointing, store, vae)
    return Memory(step, stored_bytes(denoiser.experts), sum(map(stored_bytes, beside)))


def advice(memory: Memory, *, checkpointing: bool, dtype: torch.dtype, cached: bool, batch_size: int, store: str | None) -> list[str]:
    """What to switch on for less memory, what saves most first; none if all of it is on."""
    activations = memory.step - memory.frozen
    found = []
    if not checkpointing and activations > memory.frozen / 4:
        found.append("--gradient-checkpointing (activations of one stage instead of all)")
    if dtype == torch.float32:
        found.append("--dtype bfloat16 (half of the experts and of the activations)")
    if store is None and memory.frozen > memory.total / 4:
        found.append(f"--store int8 (a quarter of {memory.frozen / 1e9:.2f} GB of experts in float32, half in bfloat16), or --store cpu")
    if not cached and memory.beside > memory.total / 20:
        found.append(f"--cache DIR ({memory.beside / 1e9:.2f} GB of VAE and text encoders)")
    if batch_size > 1:
        found.append(f"--batch-size {batch_size // 2} --accumulate 2 (the same step in two parts)")
    return found
