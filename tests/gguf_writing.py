"""Write GGUF files byte by byte, as ComfyUI-GGUF and stable-diffusion.cpp lay them out, with whatever is wrong in them."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30, torch.int32: 26}  # of types
INT32, TEXT, ARRAY, UINT32 = 5, 8, 9, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, value: Any) -> bytes:
    """An entry of the header: a text, a list of texts or of numbers, or a number."""
    if isinstance(value, str):
        return text(name) + struct.pack("<I", TEXT) + text(value)
    if isinstance(value, list) and isinstance(value[0], str):
        return text(name) + struct.pack("<IIQ", ARRAY, TEXT, len(value)) + b"".join(map(text, value))
    if isinstance(value, list):
        return text(name) + struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    return text(name) + struct.pack("<II", UINT32, value)


def info(name: str, shape: tuple[int, ...], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)


def header(infos: list[bytes], fields: Mapping[str, Any], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(infos), len(fields)) + b"".join(field(*one) for one in fields.items()) + b"".join(infos)


def write_gguf(path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None = None, alignment: int = 32) -> Path:
    """Save plain tensors."""
    infos, body = [], b""
    for name, tensor in tensors.items():
        infos.append(info(name, tuple(tensor.shape), NUMBERS[tensor.dtype], len(body)))
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        body += content + bytes(-len(content) % alignment)
    begin = header(infos, {"general.architecture": "sd3", "tokens": ["a", "cat"], **(fields or {})})
    path.write_bytes(begin + bytes(-len(begin) % alignment) + body)
    return path
