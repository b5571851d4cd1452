"""Prompts with weights of words, and of any length, as the embeddings that stock pipelines take.

Works where all text encoders are CLIP's (SD 1.x, 2.x, SDXL). Each expert's states are weighted by themselves.
Source: AUTOMATIC1111/stable-diffusion-webui 1.10, modules/sd_hijack_clip.py and modules/sd_emphasis.py
("Original"). What differs is in docs/fidelity.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.experts.expert import TEXT_ENCODERS, TOKENIZERS
from afa.models.registry import interface_of
from afa.prompt_syntax import Chunk, check_syntax, make_chunks, read_weights
from afa.stages.interface import ModelInterface
from afa.text_encoder import EnsembleTextEncoder


def weighted_prompts(
    pipeline: Any,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    guided: bool = True,
) -> dict[str, Tensor | None]:
    """Encode prompts in A1111's syntax: pipe(**afa.weighted_prompts(pipe, ["a (red:1.3) ring"])).

    pipeline:         a stock pipeline of SD 1.x, 2.x or SDXL, of an ensemble or of one model
    prompts:          B texts
    negative_prompts: B texts; None: what the stock pipeline takes without one
    guided:           whether guidance is on; if not, there are no negative embeddings
    Returns arguments of the pipeline, (B, T, D) and for SDXL (B, D) too. T is the window of the text encoder
    times the largest number of chunks; shorter prompts are filled up by chunks of the empty prompt.
    Raises UserError for other pipelines, for syntax that is not supported, and for weights that leave no
    finite states.
    """
    require_weights(interface_of(pipeline)[0])
    check_syntax(prompts)
    check_syntax(negative_prompts or (), "negative prompt")
    zeros = negative_prompts is None and getattr(pipeline.config, "force_zeros_for_empty_prompt", False)
    negatives = [""] * len(prompts) if negative_prompts is None else list(negative_prompts)
    both = [list(prompts), *([negatives] if guided and not zeros else [])]
    chunks = [_chunks(pipeline, texts) for texts in both]  # by prompt or negative, text encoder, prompt
    count = max(len(one) for slots in chunks for slot in slots for one in slot)
    encoded = [_encode(pipeline, slots, count) for slots in chunks]
    states, pooled = encoded[0]
    found: dict[str, Tensor | None] = {"prompt_embeds": states}
    if pooled is not None:
        found["pooled_prompt_embeds"] = pooled
    if guided:
        negative = encoded[1] if len(encoded) > 1 else (torch.zeros_like(states), pooled)
        found["negative_prompt_embeds"] = negative[0]
        if pooled is not None:
            found["negative_pooled_prompt_embeds"] = torch.zeros_like(pooled) if zeros else negative[1]
    return found


def require_weights(interface: ModelInterface) -> None:
    """Raise UserError for a family whose text encoders cannot be given weights of words."""
    if not interface.weighted_prompts:
        name = interface.pipeline_class or type(interface).__name__
        raise UserError(
            f"prompt syntax a1111 is for models that read prompts with CLIP alone (SD 1.x, 2.x, SDXL), and "
            f"those of {name} do not; leave it out: prompts are then read as they are"
        )


def count_chunks(pipeline: Any, prompts: Sequence[str]) -> list[int]:
    """Return the number of chunks of every prompt; images in one batch must agree in it."""
    slots = _chunks(pipeline, prompts)
    return [max(map(len, of_prompt)) for of_prompt in zip(*slots, strict=True)]


def _parts(pipeline: Any) -> list[tuple[Any, Any]]:
    """The pipeline's tokenizers with their text encoders."""
    pairs = [
        (getattr(pipeline, tokenizer, None), getattr(pipeline, encoder, None))
        for tokenizer, encoder in zip(TOKENIZERS, TEXT_ENCODERS, strict=True)
    ]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]


def _chunks(pipeline: Any, prompts: Sequence[str]) -> list[list[list[Chunk]]]:
    """Return the chunks by text encoder and prompt."""
    found = []
    for tokenizer, _ in _parts(pipeline):
        own = list(prompts)
        if set(tokenizer.added_tokens_encoder) - set(tokenizer.all_special_tokens):
            own = pipeline.maybe_convert_prompt(own, tokenizer)  # spells out words of textual inversions
        found.append([make_chunks(read_weights(text), tokenizer) for text in own])
    return found


def _encode(pipeline: Any, slots: Sequence[Sequence[Sequence[Chunk]]], count: int) -> tuple[Tensor, Any]:
    """Encode prompts in `count` chunks. Returns states (B, T, D), and pooled states of the first chunk (B, D)
    or None."""
    pooled, joined = None, []
    parts = _parts(pipeline)
    for (tokenizer, encoder), prompts in zip(parts, slots, strict=True):
        (empty,) = make_chunks(read_weights(""), tokenizer)
        filled = [[*chunks, *[empty] * (count - len(chunks))] for chunks in prompts]
        states = []
        for chunks in zip(*filled, strict=True):  # the same chunk of all prompts
            output = _run(encoder, chunks, pipeline._execution_device, several=len(parts) > 1)
            if len(parts) == 1:
                read = output[0]
            else:  # as the stock pipeline of SDXL
                read = output.hidden_states[-2]
                if pooled is None and output[0].ndim == 2:
                    pooled = output[0]
            states.append(_weighted(read, chunks, encoder))
        joined.append(torch.cat(states, dim=1))
    return torch.cat(joined, dim=-1), pooled


def _run(encoder: Any, chunks: Sequence[Chunk], device: Any, several: bool) -> Any:
    """Run a text encoder as the stock pipelines do."""
    ids = torch.tensor([chunk.tokens for chunk in chunks], device=device)
    if several:
        return encoder(ids, output_hidden_states=True)
    mask = None
    if getattr(encoder.config, "use_attention_mask", False):
        places = torch.arange(ids.shape[1], device=device)
        mask = (places < torch.tensor([[chunk.read] for chunk in chunks], device=device)).long()
    return encoder(ids, attention_mask=mask)


def _weighted(states: Tensor, chunks: Sequence[Chunk], encoder: Any) -> Tensor:
    """Multiply the states of every token by its weight, and restore their mean.

    states: (B, T, D), or (B, T, N·D) joined over experts, each of which keeps a mean of its own
    """
    experts = len(encoder.of_expert) if isinstance(encoder, EnsembleTextEncoder) and encoder.joined else 1
    rows = []
    for row, chunk in zip(states, chunks, strict=True):
        if any(weight != 1 for weight in chunk.weights):  # others stay as they are, bit for bit
            weights = torch.tensor(chunk.weights, device=row.device, dtype=row.dtype)[:, None]
            parts = row.chunk(experts, dim=-1)
            row = torch.cat([_emphasized(part.contiguous(), weights) for part in parts], dim=-1)
        rows.append(row)
    return torch.stack(rows)


def _emphasized(states: Tensor, weights: Tensor) -> Tensor:
    """Weight one expert's states of one chunk: (T, D) and (T, 1) -> (T, D)."""
    weighted = states * weights
    result = weighted * (states.mean() / weighted.mean())
    if not bool(torch.isfinite(result).all()):
        raise UserError("the weights in a prompt leave no finite states; give smaller ones")
    return result
