"""The one reader of experts' tensors: as they are in files, or multiplied by their scales."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from afa.experts.dtypes import DTYPES
from afa.experts.gguf_files import SUFFIX, load_gguf
from afa.experts.headers import Entry
from afa.experts.scales import undone

CODES = {dtype: code for code, dtype in DTYPES.items()}
MAPPED = 256 << 20  # bytes read from all files before they are mapped anew, which lets the read pages go


class TensorReader:
    """Tensors of files, which stay open while it is used.

    with TensorReader() as reader:
        weight = reader.tensor(entry)

    remap: map the files anew from time to time, for tensors that are not kept
    """

    def __init__(self, remap: bool = False) -> None:
        self._remap = remap
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._mapped = 0  # bytes read since the files were mapped

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._open.clear()
        self._mapped = 0

    def tensor(self, entry: Entry) -> Tensor:
        """One tensor in the file's dtype, or in float32 what has a scale or was in blocks of GGUF."""
        stored = self._stored(entry)
        return stored if entry.scale is None else undone(stored, self._stored(entry.scale))

    def _stored(self, entry: Entry) -> Tensor:
        if entry.file.suffix == SUFFIX:
            kind = CODES.get(entry.dtype, entry.dtype)
            return load_gguf(entry.file, kind, entry.shape, entry.start, entry.end)
        if self._remap and self._mapped > MAPPED:
            self.__exit__()
        if entry.file not in self._open:
            self._open[entry.file] = self._stack.enter_context(safe_open(entry.file, framework="pt"))
        tensor: Tensor = self._open[entry.file].get_tensor(entry.name)
        self._mapped += tensor.numel() * tensor.element_size()
        return tensor
