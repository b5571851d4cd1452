"""What weight files say about their tensors, read without the tensors: dtypes, shapes, and where the bytes lie."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.original import read_header

NAMES = ("diffusion_pytorch_model", "model")  # of weight files: diffusers', transformers'
PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = 1 << 20
# Renamed since: attention of old VAEs by diffusers; the inner model of CLIP encoders by transformers 5.6, and the two of Qwen2.5-VL
# by 4.52, which are still stored as they were.
RENAMED = [
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    (r"^text_model\.", ""),
    (r"^visual\.", "model.visual."),
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as torch calls it, its shape, and its bytes [start, end) in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def meta(self) -> Tensor:
        """A tensor of this shape without content."""
        return torch.empty(self.shape, device="meta")


Tensors = dict[str, Entry]


def read_file(file: Path) -> Tensors:
    """The tensors of a .safetensors file. Raises UserError if it is broken or cut off."""
    header = read_header(file)
    with file.open("rb") as stream:
        first = 8 + int.from_bytes(stream.read(8), "little")
    return {
        name: Entry(file, DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), *_place(entry, first))
        for name, entry in header.items()
    }


def _place(entry: dict[str, Any], first: int) -> tuple[int, int]:
    """The bytes of a header's entry, counted from the beginning of the file."""
    start, end = entry["data_offsets"]
    return first + start, first + end


def read_folder(folder: Path) -> Tensors | None:
    """The tensors of a component's folder, whole or in shards; None if they are pickled and cannot be looked into.

    Raises UserError if there are no weights that a loader would find, or if a file is missing, broken or cut off.
    """
    for name in NAMES:
        if (folder / f"{name}.safetensors").is_file():
            return read_file(folder / f"{name}.safetensors")
        if (folder / f"{name}.safetensors.index.json").is_file():
            return _read_shards(folder, folder / f"{name}.safetensors.index.json")
    if any((folder / f"{name}{ending}").is_file() for name in PICKLES for ending in ("", ".index.json")):
        return None
    others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "none at all"
    raise UserError(f"{folder} has no weights under a name that is loaded ({' or '.join(NAMES)} + .safetensors); found: {others}")


def _read_shards(folder: Path, index: Path) -> Tensors:
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({error}); download it again") from None
    tensors: Tensors = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, one of {len(files)} files its weights are in; download it again")
        tensors |= read_file(folder / name)
    return tensors


def dtype_of(tensors: Tensors | None) -> str | None:
    """The dtype most of the bytes are in; None if that is not known."""
    if not tensors:
        return None
    sizes: dict[str, int] = {}
    for entry in tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
    return max(sizes, key=lambda dtype: sizes[dtype])


def check_fit(model: nn.Module, found: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError for weights that a model needs and a file lacks, or has in another shape. It may have more."""
    same = tied(model)
    present = {same.get(_today(name), _today(name)): tensor for name, tensor in found.items()}
    wanted = {_today(name): tensor for name, tensor in model.state_dict().items() if _today(name) not in same}
    lacking = [name for name in wanted if name not in present]
    if lacking:
        missing = f"{len(lacking)} of {len(wanted)} weights (first: {lacking[0]})"
        raise UserError(f"{where} lacks {missing}; it is incomplete: download or export it again")
    for name, tensor in wanted.items():
        if present[name].shape != tensor.shape:
            shapes = f"{tuple(present[name].shape)}, its config makes it {tuple(tensor.shape)}"
            raise UserError(f"{where}: {name} has shape {shapes}; weights and config belong to different models")


def tied(model: nn.Module) -> dict[str, str]:
    """Names of a model's state that stand for the tensor of another name -> that name. T5 ties its embeddings; files hold either or both."""
    first: dict[int, str] = {}
    state = {_today(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: first[id(tensor)] for name, tensor in state.items() if first.setdefault(id(tensor), name) != name}


def _today(name: str) -> str:
    """A tensor's name as the installed libraries have it."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def same_bytes(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of tensors are equal bit for bit; stops at the first difference."""
    if {name: (e.dtype, e.shape) for name, e in one.items()} != {name: (e.dtype, e.shape) for name, e in other.items()}:
        return False
    if all(entry.file.resolve() == other[name].file.resolve() for name, entry in one.items()):
        return True
    return all(mine == theirs for name in one for mine, theirs in zip(_blocks(one[name]), _blocks(other[name]), strict=True))


def _blocks(entry: Entry) -> Iterator[bytes]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        for position in range(entry.start, entry.end, BLOCK):
            yield stream.read(min(BLOCK, entry.end - position))
