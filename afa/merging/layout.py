"""How a merged checkpoint is laid out: the tensors of each file to write, as a diffusers folder or in original layout."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from afa.errors import UserError
from afa.experts.headers import DTYPES
from afa.experts.prediction import keys_of
from afa.merging.original import DENOISER, Place, names_by_key, original_places, shape_to_original
from afa.merging.parts import TEXT_ENCODERS
from afa.merging.sources import Source, Stored

CODES = {dtype: code for code, dtype in DTYPES.items()}  # as a .safetensors header has them
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Item:
    """One tensor to write: its name, code and shape in the file; from which keys (three thirds, or one), in which form.

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
        return prod(self.shape) * BYTES.get(self.code, 1)


def diffusers_files(first: Source, vae: Source | None, dtype: str | None) -> Iterator[tuple[str, list[Item]]]:
    """One file per part of a pipeline (or of a bare denoiser), each tensor under the name its origin has for it.

    first: the expert whose form the result takes. vae: whence the VAE comes. dtype: of floats, None for the origin's.
    Raises UserError for a pipeline without VAE.
    """
    parts = [part for part in first.parts if part != "vae"] + (["vae"] if vae else [])
    if vae is None and first.located.whole_pipeline:
        raise UserError(f"'{first.name}' has no VAE, and a pipeline's folder needs one; choose it with --vae")
    for part in parts:
        origin = vae if part == "vae" and vae else first
        own = {key: stored for key, stored in origin.tensors.items() if key.startswith(f"{part}.")}
        named = {key: _diffusers_name(key) if origin.located.single_file else stored.name for key, stored in own.items()}
        items = [Item(named[key], _code(stored, dtype), stored.shape, (key,)) for key, stored in own.items()]
        file = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
        yield f"{f'{part}/' if first.located.whole_pipeline else ''}{file}.safetensors", items


def _code(stored: Stored, dtype: str | None) -> str:
    return CODES[dtype] if dtype and stored.is_float else CODES.get(stored.dtype, stored.dtype)


def _diffusers_name(key: str) -> str:
    """The name that a single file's tensor gets in a folder; CLIP's get the prefix that every version of transformers can read."""
    part, _, name = key.partition(".")
    return f"text_model.{name}" if part in TEXT_ENCODERS and not name.startswith("text_projection") else name


def original_file(first: Source, vae: Source | None, dtype: str | None) -> list[Item]:
    """One file for all parts, or for a U-Net alone as the first expert's file has it. What that has besides (its EMA copy
    excepted) stays in; the empty tensors that say what a model predicts are its scheduler's.

    Arguments as above. Raises UserError for what the layout has no place for.
    """
    alone = first.located.single_file and not first.located.whole_pipeline
    if first.denoiser != DENOISER or not (first.located.whole_pipeline or alone):
        what = "is only a denoiser" if first.denoiser == DENOISER else f"has a {first.denoiser}"
        raise UserError(
            f"'{first.name}' {what}, and a single file in original layout is of a whole SD 1.x, 2.x or XL; give a folder as --output"
        )
    items: dict[str, Item] = {}
    for part in dict.fromkeys((*first.parts, *(["vae"] if vae else []))):
        origin = vae if part == "vae" and vae else first
        items |= {item.name: item for item in _original_part(part, origin, first, dtype)}
    spare = {name: stored for name, stored in first.spare.items() if name not in items}
    assert first.outline is not None
    said = [Item(name, "F32", (0,)) for name in keys_of(first.outline.expert.scheduler)]
    return [*items.values(), *said, *(Item(name, _code(stored, None), stored.shape, spare=stored) for name, stored in spare.items())]


def _original_part(part: str, origin: Source, first: Source, dtype: str | None) -> Iterator[Item]:
    opened = part in TEXT_ENCODERS and first.open_clip(part)
    own = {key.partition(".")[2]: stored for key, stored in origin.tensors.items() if key.startswith(f"{part}.")}
    own = {name: stored for name, stored in own.items() if stored.is_float or not opened}  # OpenCLIP has no position_ids
    try:
        places = original_places(part, own, stages=first.stages, xl="text_encoder_2" in first.parts, open_clip=opened)
    except ValueError as error:
        raise UserError(f"'{origin.name}': {error}; give a folder as --output") from None
    if first.located.single_file and not first.located.whole_pipeline:
        layout = first.located.layout
        named = {name: Place(layout.prefix + name) for name in own} if layout.diffusers else places
        places = {name: replace(place, key=layout.own(place.key)) for name, place in named.items()}
    for key, names in names_by_key(places).items():
        stored, form = own[names[0]], places[names[0]].form
        shape = shape_to_original(stored.shape, form)
        yield Item(key, _code(stored, dtype), shape, tuple(f"{part}.{name}" for name in names), form)
