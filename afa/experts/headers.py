"""The one reader of headers: dtypes, shapes and places of tensors, without the tensors.

Every .safetensors and GGUF file goes through it before it is opened, so that a broken, quantised or foreign
file gives the same error in every command. Also here: whether tensors fit a model, are equal, and are finite.
Format: https://github.com/huggingface/safetensors#format
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.dtypes import BITS, DTYPES, GGUF_BLOCKS, is_float
from afa.experts.gguf_files import SUFFIX, read_gguf
from afa.experts.scales import LONGEST as LONGEST_NOTE
from afa.experts.scales import QuantisedError, Scales, find_scales, part_of
from afa.text_files import parse_json

LONGEST = 100_000_000  # bytes of a header that the safetensors library accepts
AGAIN = "download or export it again"
BLOCK = 1 << 20
NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.)")  # of a layer, in a tensor's name
# Names that changed: attention of old VAEs in diffusers; the inner model of CLIP text encoders in
# transformers 5.6, and by 4.52 those of Qwen2.5-VL and Mistral 3, which are still stored as they were.
RENAMED = [
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    (r"^text_model\.", ""),
    (r"^visual\.", "model.visual."),
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
]


@dataclass(frozen=True)
class Entry:
    """The header of one tensor.

    file:       the file that holds it
    name:       its name there
    dtype:      torch's name of its dtype in the file, such as float16
    shape:      its shape
    start, end: its bytes [start, end) in the file
    scale:      what its numbers are multiplied by when they are read, see afa.experts.scales; None: nothing
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    scale: "Entry | None" = None

    @property
    def is_float(self) -> bool:
        """Whether a weight can be read from it."""
        return is_float(self.dtype) or self.scale is not None

    @property
    def undone(self) -> bool:
        """Whether its numbers are computed when it is read: with a scale, or from blocks of a few bits."""
        return self.scale is not None or self.dtype in GGUF_BLOCKS

    def meta(self) -> Tensor:
        """A tensor of this shape on the meta device, in float32; in int64 if it is no float."""
        return torch.empty(self.shape, device="meta", dtype=torch.float32 if self.is_float else torch.int64)


Tensors = dict[str, Entry]


def read_file(file: Path, within: str = "") -> Tensors:
    """The headers of a file's tensors, by name: weights as afa.experts.tensors reads them, with their scales.

    within: what stands before the names of a component beside others; scales are looked for among its weights

    CLIP's `position_ids` (0, 1, 2 …) count as int64, whatever dtype other programs left them in. They are no
    weights: text encoders make them themselves.
    Raises UserError if the file is broken, cut off, longer than its header says, or quantised in a way that
    is not undone.
    """
    if file.suffix == SUFFIX:
        return {
            name: Entry(file, name, DTYPES.get(kind, kind), shape, start, end)
            for name, (kind, shape, start, end) in read_gguf(file).items()
            if not is_position_ids(name)
        }
    header, _, first, scales = _read(file, part_of(within))

    def entry(name: str, scale: Entry | None = None) -> Entry:
        found = header[name]
        start, end = found["data_offsets"]
        dtype = "I64" if is_position_ids(name) else DTYPES.get(found["dtype"], found["dtype"])
        return Entry(file, name, dtype, tuple(found["shape"]), first + start, first + end, scale)

    scale = {name: entry(other) for name, other in scales.of.items()}
    return {name: entry(name, scale.get(name)) for name in header if name not in scales.beside}


def read_header(file: Path) -> dict[str, Any]:
    """The header of a file as it is written: tensor's name -> dtype, shape, data_offsets.

    For readers that take the tensors as they are in the file.
    Raises UserError as read_file does, and for weights with scales beside them.
    """
    header, _, _, scales = _read(file)
    if scales.beside:
        raise _quantised(file, min(scales.beside))
    return header


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in a .safetensors file's header; GGUF has none. Raises UserError as read_file does."""
    return {} if file.suffix == SUFFIX else _read(file)[1]


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. Raises UserError as read_header does."""
    read_header(file)
    return load_file(file)


def _read(file: Path, part: str = "") -> tuple[dict[str, Any], dict[str, str], int, Scales]:
    """The tensors' entries, the metadata, the byte at which the tensors begin, and what belongs together."""
    header, metadata, first = _read_text(file)

    def content(name: str) -> bytes:
        start, end = header[name]["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(first + start)
            return stream.read(min(end - start, LONGEST_NOTE))

    try:
        return header, metadata, first, find_scales(header, metadata, content, part)
    except QuantisedError as error:
        raise _quantised(file, error) from None


def _quantised(file: Path, what: object) -> UserError:
    return UserError(
        f"{file} holds quantised weights ({what}), which would be read without their scales; "
        "take the model in bf16, fp16 or fp8, or save it as such"
    )


def _read_text(file: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The tensors' entries, the metadata, and the byte at which the tensors begin."""
    if not file.is_file():  # reading a pipe might never end
        raise UserError(f"{file} is no file; give a .safetensors file")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            begin = stream.read(8)
            length = int.from_bytes(begin, "little")
            text = stream.read(length) if length <= min(LONGEST, size - 8) else None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        if begin == b"version ":
            raise ValueError("it is a pointer of Git LFS; fetch the weights with: git lfs pull")
        if text is None:
            raise ValueError(f"a header of {length} bytes is promised, the file has {size}")
        header = parse_json(text.decode(), "its header")
        if not isinstance(header, dict):
            raise ValueError("its header is no table of tensors")
        metadata = header.pop("__metadata__", None)
        end = 8 + length + _check_entries(header)
    except UnicodeDecodeError:
        raise UserError(
            f"{file} is not a readable .safetensors file (its header is not UTF-8); {AGAIN}"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not a readable .safetensors file ({error}); {AGAIN}") from None
    if size < end:
        raise UserError(f"{file} is cut off: it has {size} bytes, its header promises {end}; {AGAIN}")
    if size > end:
        raise UserError(
            f"{file} is longer than its header says: it has {size} bytes, its tensors end at {end}; {AGAIN}"
        )
    _check_metadata(file, metadata)
    return header, metadata or {}, 8 + length


def _check_entries(header: dict[str, Any]) -> int:
    """Return the byte at which the last tensor ends.

    Raises ValueError for entries that describe no tensor, and for tensors that overlap or leave a gap.
    """
    for name, entry in header.items():
        fault = _fault(entry)
        if fault:
            raise ValueError(f"its tensor '{name}' {fault}")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, following = entry["data_offsets"]
        if start != end:
            raise ValueError(f"its tensor '{name}' begins at byte {start}, the one before ends at {end}")
        end = following
    return end


def _fault(entry: Any) -> str | None:
    """Why an entry describes no tensor; None if it does."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        return "has no dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"is of the unknown dtype {dtype!r:.60}"
    if not isinstance(shape, list) or any(type(side) is not int or side < 0 for side in shape):
        return f"has the shape {shape!r:.60}"
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(place) is not int for place in offsets):
        return f"has the data_offsets {offsets!r:.60}, which must be two whole numbers"
    start, end = offsets
    if not 0 <= start <= end:
        return f"has the data_offsets {offsets}, which are out of range"
    if (end - start) * 8 != prod(shape) * BITS[dtype]:
        return f"has {end - start} bytes, which is not what the shape {shape!r:.60} in {dtype} takes"
    return None


def _check_metadata(file: Path, metadata: Any) -> None:
    """Raise UserError for __metadata__ that the safetensors library cannot read."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise UserError(
            f"{file}: its __metadata__ is a {type(metadata).__name__}, not a table of texts; "
            "save it again without"
        )
    for name, value in metadata.items():
        if not isinstance(value, str):
            what = f"'{name}' is a {type(value).__name__}"
            raise UserError(
                f"{file}: its __metadata__ may hold texts only, and {what}; save it again without that entry"
            )


def is_position_ids(name: str) -> bool:
    """Whether a tensor is CLIP's list of positions 0, 1, 2 …, which is no weight."""
    return name.rpartition(".")[2] == "position_ids"


def dtype_of(tensors: Tensors | None) -> str | None:
    """The dtype of most bytes; None if there are no tensors."""
    if not tensors:
        return None
    sizes: dict[str, int] = {}
    for entry in tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.start
    return max(sizes, key=lambda dtype: sizes[dtype])


def check_fit(model: nn.Module, found: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Find every weight of a model among the tensors of a file, which may have other parts besides.

    found: by diffusers' names, of whichever version
    where: the file, for messages
    Returns the tensors by the names in the model's state, position_ids excepted.
    Raises UserError for weights that the file lacks, or has in another shape, or as whole numbers, and for
    more layers than the model has.
    """
    same = tied(model)
    present = {same.get(current_name(name), current_name(name)): tensor for name, tensor in found.items()}
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_position_ids(name)}
    wanted = {current_name(name): tensor for name, tensor in state.items() if current_name(name) not in same}
    lacking = [name for name in wanted if name not in present]
    if lacking:
        missing = f"{len(lacking)} of {len(wanted)} weights (first: {lacking[0]})"
        raise UserError(f"{where} lacks {missing}; it is incomplete: download or export it again")
    if (name := beyond(present, wanted)) is not None:
        raise UserError(
            f"{where} holds {name}, a layer that its config does not make; weights and config belong to "
            "different models"
        )
    for name, tensor in wanted.items():
        if present[name].shape != tensor.shape:
            shapes = f"{tuple(present[name].shape)}, its config makes it {tuple(tensor.shape)}"
            raise UserError(
                f"{where}: {name} has shape {shapes}; weights and config belong to different models"
            )
        if tensor.is_floating_point() and not present[name].is_floating_point():
            raise UserError(
                f"{where}: {name} holds whole numbers where weights are expected; "
                "take the model in bf16 or fp16"
            )
    return {name: present[same.get(current_name(name), current_name(name))] for name in state}


def beyond(names: Iterable[str], wanted: Collection[str]) -> str | None:
    """Return a name that differs from wanted ones in its numbers alone, so of a layer too much; or None."""
    forms = {NUMBER.sub("#", name) for name in wanted}
    return next((name for name in names if name not in wanted and NUMBER.sub("#", name) in forms), None)


def tied(model: nn.Module) -> dict[str, str]:
    """Names in a model's state that share the tensor of an earlier name -> that name.

    T5 ties its embeddings; files hold either or both.
    """
    first: dict[int, str] = {}
    state = {current_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    return {
        name: first[id(tensor)]
        for name, tensor in state.items()
        if first.setdefault(id(tensor), name) != name
    }


@lru_cache(maxsize=1 << 14)  # models of one family share most names
def current_name(name: str) -> str:
    """A tensor's name in the installed diffusers and transformers, whichever version wrote the file."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def same_bytes(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of tensors are equal bit for bit, position_ids excepted.

    Files are read until their first difference.
    """
    one, other = (
        {
            key: entry
            for name, whole in tensors.items()
            if not is_position_ids(name)
            for key, entry in ((name, whole), (f"{name} scale", whole.scale))
            if entry is not None
        }
        for tensors in (one, other)
    )
    if {name: (e.dtype, e.shape) for name, e in one.items()} != {
        name: (e.dtype, e.shape) for name, e in other.items()
    }:
        return False
    if all(entry.file.resolve() == other[name].file.resolve() for name, entry in one.items()):
        return True
    return all(
        mine == theirs
        for name in one
        for mine, theirs in zip(_blocks(one[name]), _blocks(other[name]), strict=True)
    )


def _blocks(entry: Entry) -> Iterator[bytes]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        for position in range(entry.start, entry.end, BLOCK):
            yield stream.read(min(BLOCK, entry.end - position))


CHUNK = 1 << 24  # numbers converted at once, for dtypes of which torch has no extremes


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    Only its extremes are looked at: a NaN anywhere becomes both of them.
    """
    if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # 8-bit floats
        return all(is_finite(part.float()) for part in tensor.detach().flatten().split(CHUNK))
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if there is none."""
    return next((name for name, tensor in named if not is_finite(tensor)), None)


def check_finite(module: nn.Module, where: str) -> None:
    """Raise UserError, with the tensor's name, for a model whose weights hold NaN or infinity.

    where: whose model it is, for the message
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    name = first_not_finite(tensors.items())
    if name is None:
        return
    half = tensors[name].dtype == torch.float16
    fit = ", or what it holds does not fit float16: try bfloat16 or float32" if half else ""
    raise UserError(
        f"{where}: {name} is not finite (NaN or infinite numbers); the file is broken: "
        f"download or export it again{fit}"
    )
