"""What the denoisers of all families do with what a pipeline hands over: states of several experts, options of attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# options of attention processors that belong to something an ensemble does not do
REFUSED = {"gligen": "GLIGEN", "ip_adapter_image_embeds": "IP-Adapter", "ip_hidden_states": "IP-Adapter"}


def split_joined(states: Tensor, widths: Sequence[int], experts: int, what: str) -> list[Tensor]:
    """Take apart states joined on the last axis as [encoder 1 of every expert | encoder 2 of every expert | …].

    (…, ΣD) belongs to every expert; (…, N·ΣD) gives each (…, ΣD). Any other width raises ValueError.
    """
    single = sum(widths)
    if states.shape[-1] == single:
        return [states] * experts
    if states.shape[-1] != experts * single:
        raise ValueError(f"{what} is {states.shape[-1]} wide; expected {single} (for all experts) or {experts * single} (for {experts} experts)")
    per_encoder = [part.chunk(experts, dim=-1) for part in states.split([experts * width for width in widths], dim=-1)]
    return [parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1) for parts in zip(*per_encoder, strict=True)]


def first_parts(kwargs: Mapping[str, Any], widths: Mapping[str, int], experts: int) -> dict[str, Any]:
    """A call with the first expert's part of joined states, as far as they are there. widths: of one expert's, by argument."""
    own = {name: split_joined(kwargs[name], (width,), experts, name)[0] for name, width in widths.items() if kwargs.get(name) is not None}
    return {**kwargs, **own}


def attention_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, float]:
    """The attention processors' options without the LoRA scale, and that scale."""
    if options is None:
        return None, 1.0
    for name, what in REFUSED.items():
        if name in options:
            raise NotImplementedError(f"{what} (attention option '{name}') is not supported by an ensemble; leave it out")
    rest = dict(options)
    scale = rest.pop("scale", 1.0)
    return rest, scale
