"""Encode captions for the denoiser with the pipeline's own encode_prompt, with caption dropout."""

import hashlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from afa.denoiser.base import EnsembleDenoiser
from afa.experts.expert import TEXT_ENCODERS, tokenizers_in
from afa.prompts import reader_of
from afa.training.cache import TextCache, VaryingTextCache, announce, content_hash

FEW = 50  # captions, encoded without a bar


def equally_long(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the shorter of two batches of states or masks, (B, T, …), with zeros to the same T."""
    length = max(one.shape[1], other.shape[1])
    first, second = (
        torch.cat([part, part.new_zeros(len(part), length - part.shape[1], *part.shape[2:])], dim=1)
        for part in (one, other)
    )
    return first, second


class Conditions:
    """Encodes captions with the ensemble's stock pipeline, or reads them from a cache that it filled.

    A dropped caption becomes the unconditional input of guidance: the empty caption, or zeros if the pipeline
    is configured so (SDXL's force_zeros_for_empty_prompt).
    """

    def __init__(self, pipeline: Any, denoiser: EnsembleDenoiser, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.interface, self.config = denoiser.interface, denoiser.config
        self.cache: TextCache | VaryingTextCache | None = None
        self._none = self._encode_nothing()
        if pipeline.config.get("force_zeros_for_empty_prompt"):
            self._none = tuple(torch.zeros_like(part) for part in self._none)

    def keep(self, folder: Path, captions: Iterable[str], batch_size: int) -> None:
        """Encode the captions that a cache folder lacks; from now on all captions are read there."""
        state, captions = PartialState(), list(captions)
        cache = self._cache(folder, captions)
        missing = cache.missing(captions)
        announce(folder, "captions", [cache.row_bytes] * len(missing))
        state.wait_for_everyone()  # all processes look before one writes
        own = missing[state.process_index :: state.num_processes]
        parts = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        for part in tqdm(
            parts, desc="encoding captions", unit="batch", file=sys.stderr, disable=len(own) < FEW
        ):
            cache.add(part, self._encode(part))
        state.wait_for_everyone()
        cache.refresh()
        self.cache = cache

    def _cache(self, folder: Path, captions: list[str]) -> TextCache | VaryingTextCache:
        if not self.interface.variable_length:
            return TextCache(
                folder, self._identity(), [(tuple(part.shape[1:]), part.dtype) for part in self._none]
            )
        states, mask = self._encode([max(captions, key=len)])
        return VaryingTextCache(
            folder, self._identity(), states.shape[2:], states.dtype, longest=int(mask.sum())
        )

    def _identity(self) -> str:
        """Return a hash of everything that decides a caption's states."""
        names = [name for name in TEXT_ENCODERS if getattr(self.pipeline, name, None) is not None]
        readers = [reader_of(tokenizer) for tokenizer in tokenizers_in(self.pipeline.components)]
        words = [sorted(reader.get_vocab().items()) for reader in readers]
        lengths = [reader.model_max_length for reader in readers]
        encoders = [getattr(self.pipeline, name) for name in names]
        joined = [getattr(encoder, "of_expert", None) for encoder in encoders]
        facts = f"{content_hash(*encoders)} {joined} {words} {lengths}"
        usual, given = self.interface.pipeline_settings, self.pipeline.config
        settings = {name: given.get(name, value) for name, value in usual.items()}
        return hashlib.sha256(f"{facts} {settings}".encode() if settings else facts.encode()).hexdigest()

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Return the denoiser's inputs from encode_prompt.

        They are states (B, T, D), or (B, T, L, D) of L layers, and, in most families, pooled states (B, P) or
        a mask (B, T).
        """
        if self.cache is not None:
            return tuple(part.to(self.device, non_blocking=True) for part in self.cache.read(captions))
        encoded = encode_prompt(self.pipeline, captions, self.device, guided=False)
        return self.interface.select_prompt_outputs(encoded)

    @torch.no_grad()
    def _encode_nothing(self) -> tuple[Tensor, ...]:
        """Return the denoiser's inputs for the empty prompt of guidance, as the pipeline encodes it."""
        nothing, places = [self.interface.empty_prompt], self.interface.negative_outputs
        if not places:
            return self._encode(nothing)
        encoded = encode_prompt(self.pipeline, nothing, self.device, guided=True)
        return self.interface.select_prompt_outputs([encoded[place] for place in places])

    def __call__(self, captions: list[str], sizes: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Return the denoiser's keyword arguments for these captions.

        sizes:   (B, 6) SDXL's size conditions
        dropped: (B,) bool, True for samples without their caption
        """
        parts = []
        for part, none in zip(self._encode(list(captions)), self._none, strict=True):
            if self.interface.variable_length:
                part, none = equally_long(part, none)
            mask = dropped.to(part.device).view(-1, *[1] * (part.ndim - 1))
            parts.append(torch.where(mask, none, part))
        return self.interface.conditions(self.config, parts, sizes.to(self.device, parts[0].dtype))


def encode_prompt(
    pipeline: Any, captions: list[str], device: torch.device, *, guided: bool
) -> tuple[Any, ...]:
    """Call a stock pipeline's encode_prompt; all text encoders get the same prompt.

    guided: also encode the empty prompt for guidance, if the pipeline does so
    Prompts are cut at the length that the pipeline's __call__ uses, which may differ from encode_prompt's
    default. The captions are copied, since some pipelines write their template into the list.
    """
    taken = inspect.signature(pipeline.encode_prompt).parameters
    called = inspect.signature(pipeline.__call__).parameters
    options = {
        "device": device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guided,
        "prompt_2": None,
        "prompt_3": None,
    }
    if "max_sequence_length" in called:
        options["max_sequence_length"] = called["max_sequence_length"].default
    found: tuple[Any, ...] = pipeline.encode_prompt(
        list(captions), **{name: value for name, value in options.items() if name in taken}
    )
    return found
