"""Write a .safetensors file as a stream: its header first, then one tensor after the other, never two at once.

The format: https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa.merging.layout import BYTES, Item

ALIGNED = 8  # the header is padded so that the tensors begin at a multiple


def write_safetensors(path: Path, items: Iterable[Item], make: Callable[[Item], Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of these items; each tensor is asked of `make` when its turn comes, and let go afterwards.

    Wider types come first, then names in order, as the library itself writes: the same merge gives the same bytes.
    """
    ordered = sorted(items, key=lambda item: (-BYTES.get(item.code, 1), item.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for item in ordered:
        header[item.name] = {"dtype": item.code, "shape": list(item.shape), "data_offsets": [end, end + item.bytes]}
        end += item.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for item in ordered:
            tensor = make(item)
            assert tuple(tensor.shape) == item.shape and tensor.numel() * tensor.element_size() == item.bytes, item
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
