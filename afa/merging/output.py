"""What a merge writes: its tensors by file, their names and forms there; and the writing of such a file."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.experts.dtypes import BITS, DTYPES, SMALL_FLOATS
from afa.experts.expert import TEXT_ENCODERS
from afa.experts.layouts import Layout
from afa.experts.prediction import keys_of
from afa.experts.transformer_places import Place, names_by_key, shape_to_original
from afa.merging.single_file import original_places
from afa.merging.sources import Stored

if TYPE_CHECKING:
    from afa.merging.plan import PlannedStep

ALIGNED = 8  # a header is padded so that the tensors begin at a multiple
CODES = {dtype: code for code, dtype in DTYPES.items()}  # as a .safetensors header has them
TYPES = {code: getattr(torch, name) for code, name in DTYPES.items()} | SMALL_FLOATS


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: its name, code and shape in the file; from which keys, in which form.

    spare: a tensor of the first expert that is written as it is, instead. With neither, it is empty.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    keys: tuple[str, ...] = ()
    form: str = "same"
    spare: Stored | None = None

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * BITS[self.code] // 8


def diffusers_files(step: "PlannedStep") -> Iterator[tuple[str, list[OutputTensor]]]:
    """One file per part of a pipeline (or of a bare denoiser), each tensor under its origin's name.

    Raises UserError for a pipeline without VAE.
    """
    first = step.first
    if step.vae is None and first.located.whole_pipeline:
        raise UserError(f"'{first.name}' has no VAE, and a pipeline's folder needs one; choose it with --vae")
    for part in step.parts:
        source = step.origin(part)
        text, foreign = part in TEXT_ENCODERS, source.origin(part).located.single_file
        tensors = []
        for name, stored in source.of(part).items():
            # CLIP's get a prefix that every version of transformers can read.
            prefix = "text_model." if text and not name.startswith("text_projection") else ""
            in_file = prefix + name if foreign else stored.name
            code = _code(stored, step.asked.dtype)
            tensors.append(OutputTensor(in_file, code, stored.shape, (f"{part}.{name}",)))
        folder = f"{part}/" if first.located.whole_pipeline else ""
        yield f"{folder}{'model' if text else 'diffusion_pytorch_model'}.safetensors", tensors


def original_file(step: "PlannedStep") -> list[OutputTensor]:
    """One file for all parts; of a transformer, or a denoiser alone, for that.

    A denoiser alone has the names of the first expert's file, and a transformer from a folder its publisher's
    with nothing before them. What else the first expert's file has (its EMA copy excepted) stays in; the
    empty tensors that say what a model predicts are its scheduler's.
    Raises UserError for what the layout has no place for.
    """
    first = step.first
    if first.denoiser == "unet" and not (first.located.whole_pipeline or first.alone):
        layout = "a single file in original layout is of a whole SD 1.x, 2.x or XL"
        raise UserError(f"'{first.name}' is only a denoiser, and {layout}; give a folder as --output")
    found = {tensor.name: tensor for part in step.parts for tensor in _original_part(part, step)}
    says = [OutputTensor(name, "F32", (0,)) for name in keys_of(first.expert.scheduler)]
    besides = [
        OutputTensor(name, _code(one, None), one.shape, spare=one)
        for name, one in first.spare.items()
        if name not in found
    ]
    return [*found.values(), *says, *besides]


def _original_part(part: str, step: "PlannedStep") -> Iterator[OutputTensor]:
    first, source = step.first, step.origin(part)
    opened = part in TEXT_ENCODERS and first.open_clip(part)  # OpenCLIP has no position_ids
    own = {name: stored for name, stored in source.of(part).items() if stored.is_float or not opened}
    layout = Layout(part) if part == "transformer" else None
    if first.alone:
        layout = first.located.layout
    if layout is not None and layout.diffusers:
        places = {name: Place(name) for name in own}
    else:
        shapes, xl = {name: stored.shape for name, stored in own.items()}, "text_encoder_2" in first.parts
        try:
            places = original_places(part, shapes, first.model, xl=xl, open_clip=opened)
        except ValueError as error:
            raise UserError(f"'{source.name}': {error}; give a folder as --output") from None
    for key, names in names_by_key(places).items():
        form = places[names[0]].form
        shape = shape_to_original([own[name].shape for name in names], form)
        code, keys = _code(own[names[0]], step.asked.dtype), tuple(f"{part}.{name}" for name in names)
        yield OutputTensor(key if layout is None else layout.own(key), code, shape, keys, form)


def _code(stored: Stored, dtype: str | None) -> str:
    """A tensor's type in the output. dtype: of floats; None: its own."""
    return CODES[dtype] if dtype and stored.is_float else CODES.get(stored.dtype, stored.dtype)


def write_safetensors(
    path: Path,
    tensors: Iterable[OutputTensor],
    make: Callable[[OutputTensor], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file of these tensors as a stream: its header first, then one tensor after the other.

    Wider types come first, then names in order, as the library writes: the same merge gives the same bytes.
    The format: https://github.com/huggingface/safetensors#format
    """
    ordered = sorted(tensors, key=lambda tensor: (-BITS[tensor.code], tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for one in ordered:
        start, end = end, end + one.bytes
        header[one.name] = {"dtype": one.code, "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for one in ordered:
            made = make(one)
            assert (tuple(made.shape), made.nbytes) == (one.shape, one.bytes), one
            stream.write(made.contiguous().reshape(-1).view(torch.uint8).numpy().data)
