"""The memory that an ensemble takes, counted from tensors without content."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from afa.cost import call_of
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.lora import base_of, shared_copy, tuner_layers
from afa.devices import LiveBytes
from afa.experts.quantised import kept_elsewhere, kept_tensors, store_weights, stored_bytes
from afa.settings import RESIDENT


def sampling_memory(
    denoiser: EnsembleDenoiser,
    size: Mapping[str, Any],
    batch: int,
    dtype: torch.dtype,
    stores: Sequence[str],
) -> list[dict[str, Any]]:
    """Count the memory of a denoising step for some ways to store the experts' weights.

    size:   "latent", its height and width, and "tokens" of the prompt
    batch:  rows of a pass; guidance doubles that of the pipeline
    dtype:  of the experts and the aggregators
    stores: resident (as they are), or of STORES
    Returns a row for each: "store", "experts" (bytes of their weights on the device) and "step" (the peak of
    all tensors in a step, without VAE, text encoders, and what an allocator wastes).
    """
    rows = []
    for store in tqdm(stores, desc="counting memory", file=sys.stderr, disable=len(stores) == 1):
        found = _step(denoiser, size, batch, dtype, None if store == RESIDENT else store)
        rows.append({"store": store, **found})
    return rows


def _step(
    denoiser: EnsembleDenoiser, size: Mapping[str, Any], batch: int, dtype: torch.dtype, store: str | None
) -> dict[str, int]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        twin = fake_copy(denoiser, dtype, dtype)
        if store is not None:
            store_weights(twin.experts, store)
        call = call_of(twin, *size["latent"], batch, size["tokens"], dtype=dtype)
        with LiveBytes(kept_elsewhere(twin.experts)) as counter:
            for weight in (*twin.parameters(), *kept_tensors(twin.experts)):
                weight.view(-1)  # counted from the start: all weights are there
            twin(**call)
    return {"experts": stored_bytes(twin.experts), "step": counter.peak}


def fake_copy(denoiser: EnsembleDenoiser, dtype: torch.dtype, aggregators: torch.dtype) -> Any:
    """Return a copy of an ensemble, made from its experts' configs; parts that experts share are made once.

    Under FakeTensorMode it takes no memory.
    dtype, aggregators: of the experts, and of the aggregators
    """
    bases: dict[int, Any] = {}
    for expert in denoiser.experts:
        if base_of(expert) not in bases:
            bases[base_of(expert)] = made(expert, dtype)
    experts = [_with_loras(shared_copy(bases[base_of(expert)]), expert, dtype) for expert in denoiser.experts]
    with _default(aggregators):
        return type(denoiser)(experts, denoiser.names, denoiser.recipe, denoiser.placement)


def made(model: Any, dtype: torch.dtype) -> Any:
    """Return a model of the same config."""
    with _default(dtype):
        return type(model).from_config(model.config).requires_grad_(False)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in this dtype; tensors without content cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _with_loras(model: Any, expert: Any, dtype: torch.dtype) -> Any:
    """Add empty LoRAs to a model, of the same shapes as the expert's."""
    for name, layer in tuner_layers(expert):
        known: dict[int, Any] = {id(layer.base_layer): model.get_submodule(name)}
        for path, weight in layer.named_parameters():
            if not path.startswith("base_layer."):
                known[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=False)
        model.set_submodule(name, copy.deepcopy(layer, known))
    return model
