"""The reader of GGUF files: their header, and their tensors, of which blocks of a few bits become float32.

GGUF is the format of llama.cpp; diffusion models have it from ComfyUI-GGUF and stable-diffusion.cpp, under
the publishers' names. A header may be a stranger's, and is read here. Blocks are undone by llama.cpp's own
package `gguf`, which is optional; files of F16, BF16 and F32 alone are read without it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the shape before ComfyUI-GGUF cut a tensor
into rows of 256: `comfy.gguf.orig_shape.<tensor>`, https://github.com/city96/ComfyUI-GGUF (tools/convert.py).
"""

import struct
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from afa.errors import UserError
from afa.experts.dtypes import DTYPES, GGUF_BLOCKS

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
# number of a tensor's type -> its name, and how many numbers a block has in how many bytes
PLAIN = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)}
WHOLE = {24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)}
TYPES = (
    PLAIN | WHOLE | {number: (name, numbers, size) for name, (number, numbers, size) in GGUF_BLOCKS.items()}
)
# of entries: the number of a type -> its code in struct; texts and arrays have their length before them
VALUES = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY, WHOLE_VALUES = 8, 9, (0, 1, 2, 3, 4, 5, 10, 11)
ALIGNMENT, SHAPE = "general.alignment", "comfy.gguf.orig_shape."
DIMENSIONS = 8  # of a tensor; ggml has at most 4
# Ends of names of tensors with a single row, of Z-Image and Krea 2: ggml does not keep that it is one.
ONE_ROW = ("x_pad_token", "cap_pad_token", "fusion.projector.weight")


class _Header:
    """The bytes of a file before its tensors, of which never more is read than there are."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise ValueError(f"it is cut off at byte {self.size:,}")
        return self.stream.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """The value of an entry; of an array, a tuple of numbers, or None for texts."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(_code(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            if count * 8 > self.size:
                raise ValueError(f"it promises {count:,} texts")
            for _ in range(count):
                self.bytes(self.number("Q"))
            return None
        code = _code(kind)
        return struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(code)))


def _code(kind: int) -> str:
    if kind not in VALUES:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return VALUES[kind]


def read_gguf(file: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The header of a file: tensor's name -> its type, shape, and its bytes [start, end).

    Raises UserError if the file is broken, cut off, or holds no tensors, for types that are not known, and
    for blocks of a few bits where the package is missing that reads them.
    """
    try:
        with file.open("rb") as stream:
            found = _read(_Header(stream, file.stat().st_size))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, struct.error, MemoryError) as error:  # a text that is not UTF-8 is a ValueError
        raise UserError(
            f"{file} is not a readable GGUF file ({error}); download or export it again"
        ) from None
    blocks = {kind for kind, *_ in found.values() if kind in GGUF_BLOCKS}
    if blocks and find_spec("gguf") is None:
        raise UserError(
            f"{file} holds weights in blocks ({', '.join(sorted(blocks))}), which llama.cpp's package reads: "
            "pip install 'afa[gguf]' (or: pip install gguf)"
        )
    return found


def _read(header: _Header) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The same. Raises ValueError."""
    if header.bytes(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = header.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, and {VERSIONS[0]} and {VERSIONS[1]} are read")
    tensors, entries = header.number("Q"), header.number("Q")
    if not tensors:
        raise ValueError("it holds no tensors")
    if max(tensors, entries) * 12 > header.size:
        raise ValueError(f"it promises {max(tensors, entries):,} entries in {header.size:,} bytes")
    alignment, shapes = 32, {}
    for _ in range(entries):
        name, kind = header.text(), header.number("I")
        value = header.value(kind)
        if name == ALIGNMENT and kind in WHOLE_VALUES:
            alignment = value
        elif name.startswith(SHAPE):
            shapes[name.removeprefix(SHAPE)] = value
    if not 0 < alignment <= 1 << 20:
        raise ValueError(f"its alignment is {alignment}")
    infos = [_info(header) for _ in range(tensors)]
    first = -(-header.stream.tell() // alignment) * alignment
    found = {}
    for name, dimensions, number, offset in infos:
        if name in found:
            raise ValueError(f"it holds {name:.80} twice")
        kind, size, shape = _sized(name, dimensions, number)
        start = first + offset
        if start + size > header.size:
            raise ValueError(f"{name:.80} ends at byte {start + size:,} of {header.size:,}")
        usual = (1, *shape) if len(shape) == 1 and name.endswith(ONE_ROW) else shape
        found[name] = (kind, _before(name, shape, shapes.get(name, usual)), start, start + size)
    return found


def _info(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, sizes (the innermost first), number of its type, and place."""
    name, count = header.text(), header.number("I")
    if count > DIMENSIONS:
        raise ValueError(f"{name:.80} has {count} dimensions")
    return name, tuple(header.number("Q") for _ in range(count)), header.number("I"), header.number("Q")


def _sized(name: str, dimensions: tuple[int, ...], number: int) -> tuple[str, int, tuple[int, ...]]:
    """A tensor's type, its size in bytes, and its shape as torch has it."""
    if number not in TYPES:
        raise ValueError(f"{name:.80} is of the unknown type {number}")
    kind, numbers, size = TYPES[number]
    if dimensions and dimensions[0] % numbers:
        raise ValueError(
            f"{name:.80} has rows of {dimensions[0]} numbers, and blocks of {kind} have {numbers}"
        )
    return kind, prod(dimensions) // numbers * size, tuple(reversed(dimensions))


def _before(name: str, shape: tuple[int, ...], noted: Any) -> tuple[int, ...]:
    """The shape that a tensor had before it was cut into rows of another length."""
    whole = isinstance(noted, tuple) and all(type(size) is int and size >= 0 for size in noted)
    if not whole or prod(noted) != prod(shape):
        raise ValueError(f"{name:.80} was of shape {noted!r:.60}, and is of {shape!r:.60}")
    return noted


def load_gguf(file: Path, kind: str, shape: tuple[int, ...], start: int, end: int) -> Tensor:
    """One tensor of a file: F64, F32, F16, BF16 and whole numbers as they are, all else in float32.

    kind, shape, start, end: as read_gguf returns them
    """
    data = np.fromfile(file, np.uint8, end - start, offset=start)
    plain = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}
    plain |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
    if kind in plain:
        return torch.from_numpy(data).view(plain[kind]).reshape(shape)
    from gguf import GGMLQuantizationType, dequantize

    # as one row: the package converts 16 rows at a time
    numbers: Any = dequantize(data[None], GGMLQuantizationType(GGUF_BLOCKS[kind][0]))
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).reshape(shape)
