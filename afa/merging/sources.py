"""An expert as a merge reads it: every tensor by its name in a diffusers pipeline, wherever and in whichever layout it lies."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.folders import read_folder, read_object
from afa.experts.headers import Tensors, is_float, is_position_ids, read_file, tied
from afa.experts.locate import Located, locate
from afa.experts.meta_model import OPEN_CLIP, Outline, read_outline
from afa.experts.prediction import says
from afa.experts.single_file import config_folder, describe_vae
from afa.experts.spec import ExpertSpec
from afa.merging.original import Place, from_original, original_places, shape_from_original
from afa.merging.parts import MERGED, today
from afa.merging.stages import key_stages
from afa.models.registry import FAMILIES

EMA = "model_ema."
MAPPED = 256 << 20  # bytes read from all files before they are mapped anew, which lets the read pages go


@dataclass(frozen=True)
class Stored:
    """One tensor of an expert: in which file, under which name, in which form (see original.Place), and what it is."""

    file: Path
    name: str
    form: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return is_float(self.dtype)

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass
class Source:
    """tensors: by "part.name". spare: what a single file holds besides (never its EMA copy, nor
    what says what it predicts, which is written anew). outline: of an expert; a VAE has none.

    config: folder of configs: the expert's own, or the one a single file is read with.
    """

    located: Located
    tensors: dict[str, Stored]
    config: Path
    spare: dict[str, Stored] = field(default_factory=dict)
    outline: Outline | None = None

    @property
    def name(self) -> str:
        return self.located.spec.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that it has weights of, the denoiser first."""
        return tuple(dict.fromkeys(key.partition(".")[0] for key in self.tensors))

    @property
    def denoiser(self) -> str:
        return self.parts[0]

    @property
    def model(self) -> nn.Module:
        """An expert's denoiser, without its numbers."""
        assert self.outline is not None
        return self.outline.expert.model

    @cached_property
    def stages(self) -> dict[str, str]:
        """The stage of every tensor of an expert."""
        return key_stages(self.tensors, self.model)

    def files(self, part: str) -> list[Path]:
        """The files a part's weights are in."""
        return sorted({stored.file for key, stored in self.tensors.items() if key.startswith(f"{part}.")})

    def floats(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what can be merged: all but whole numbers."""
        return {key: stored.shape for key, stored in self.tensors.items() if stored.is_float}

    def open_clip(self, part: str) -> bool:
        """Whether a text encoder was OpenCLIP's: SDXL's second, and SD 2.x'.

        Of the latter, a single file's names tell, and in a folder the activation.
        """
        if "text_encoder_2" in self.parts:
            return part == "text_encoder_2"
        if self.located.single_file:
            return any(stored.name.startswith(OPEN_CLIP) for key, stored in self.tensors.items() if key.startswith(f"{part}."))
        return read_object(self.config / part / "config.json").get("hidden_act") == "gelu"


def open_source(spec: ExpertSpec, config: str | None = None) -> Source:
    """Find an expert's tensors, without reading them. config: of a single file, as in load_expert.

    Raises UserError if it cannot be found, is broken, incomplete or pickled, or has LoRAs.
    """
    if spec.loras:
        raise UserError(
            f"expert '{spec.name}' has a LoRA ({spec.loras[0].path}), and only whole checkpoints are merged from files;"
            " fuse it into a pipeline and save that, or merge in memory with afa.merge_pipelines"
        )
    located = locate(spec)
    if located.single_file:
        return _from_single_file(located, config)
    return _from_folder(located)


def open_vae(text: str, like: Source, config: str | None = None) -> Source:
    """The source of a VAE: an expert's, a VAE's own folder, or its own file. like: an expert that it is to serve.

    Raises UserError if there is none, or one of another kind.
    """
    spec = ExpertSpec.parse(text)
    located = locate(spec)
    if located.single_file and located.layout.part != "pipeline":
        return _vae_file(located, like, config)
    if not located.single_file and not located.whole_pipeline:
        kind = read_object(located.path / "config.json").get("_class_name")
        if kind != "AutoencoderKL":
            raise UserError(f"{located.path} is no VAE (its config.json says {kind})")
        return Source(located, _folder_tensors(located.path, "vae"), located.path)
    source = open_source(spec, config)
    if "vae" not in source.parts:
        raise UserError(f"'{spec.name}' has no VAE; choose another with --vae")
    return source


def _vae_file(located: Located, like: Source, config: str | None) -> Source:
    assert like.outline is not None
    model, layout = describe_vae(located.path, like.outline.expert, config)
    entries, names = read_file(located.path), list(model.state_dict())
    places = {name: Place(layout.prefix + name) for name in names} if layout.diffusers else original_places("vae", names)
    found = {f"vae.{name}": _stored(entries, replace(place, key=layout.own(place.key))) for name, place in places.items()}
    return Source(located, found, like.config if config is None else config_folder(config))


def _from_folder(located: Located) -> Source:
    """A diffusers pipeline's folder, or a bare denoiser's."""
    path, outline = located.path, read_outline(located.spec)
    if not located.whole_pipeline:
        part = FAMILIES[outline.expert.family].component
        return Source(located, _folder_tensors(path, part, outline.expert.model), path, outline=outline)
    parts = [part for part in (*MERGED, "vae") if part in outline.parts]
    tensors = {key: stored for part in parts for key, stored in _folder_tensors(path / part, part, outline.parts[part]).items()}
    return Source(located, tensors, path, outline=outline)


def _folder_tensors(folder: Path, part: str, model: nn.Module | None = None) -> dict[str, Stored]:
    """A part's tensors, each once, though a file may hold one under two names. model: the part's, without its numbers."""
    found, same = read_folder(folder), tied(model) if model is not None else {}
    tensors: dict[str, Stored] = {}
    for name, entry in found.items():
        key = same.get(today(name), today(name))
        tensors.setdefault(f"{part}.{key}", Stored(entry.file, name, "same", entry.dtype, entry.shape))
    return tensors


def _from_single_file(located: Located, config: str | None) -> Source:
    """A whole checkpoint in original layout, or its U-Net alone."""
    layout = located.layout
    if layout.part == "transformer":
        raise UserError(
            f"{located.path} is no single file of SD 1.x, 2.x or XL, and other models are merged from diffusers folders only; give its folder"
        )
    outline = read_outline(located.spec, config)
    assert outline.folder is not None
    tensors: dict[str, Stored] = {}
    for part, entries in outline.stored.items():
        names = [today(name) for name in outline.parts[part].state_dict()]
        if layout.diffusers:
            tensors |= {f"{part}.{name}": _stored(entries, Place(layout.prefix + name)) for name in names}
            continue
        opened = any(name.startswith(OPEN_CLIP) for name in entries)
        stages = key_stages([f"{part}.{name}" for name in names], outline.expert.model)
        places = original_places(part, names, stages=stages, xl="text_encoder_2" in outline.parts, open_clip=opened)
        if layout.part == "unet":
            places = {name: replace(place, key=layout.own(place.key)) for name, place in places.items()}
        tensors |= {f"{part}.{name}": _stored(entries, place) for name, place in places.items()}
    used = {stored.name for stored in tensors.values()}
    others = {name: entry for name, entry in read_file(located.path).items() if not (name in used or name.startswith(EMA) or says(name))}
    spare = {name: Stored(entry.file, name, "same", entry.dtype, entry.shape) for name, entry in others.items()}
    return Source(located, tensors, outline.folder, spare, outline)


def _stored(entries: Tensors, place: Place) -> Stored:
    """A tensor at its place, allowing for what the oldest files have otherwise."""
    key = place.key if place.key in entries else place.key.replace(".text_model.", ".")
    entry = entries[key]
    form = "same" if place.form == "conv" and len(entry.shape) == 2 else place.form
    return Stored(entry.file, key, form, entry.dtype, shape_from_original(entry.shape, form))


class Reader:
    """Tensors from memory-mapped files, which stay open while it is used: with Reader() as reader: reader.read(stored)."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._mapped = 0  # bytes read since the files were mapped

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._open.clear()
        self._mapped = 0

    def read(self, stored: Stored) -> Tensor:
        """One tensor, in its diffusers form and in the file's dtype; position_ids as they should be, whatever the file has."""
        if is_position_ids(stored.name):
            return torch.arange(stored.numbers).reshape(stored.shape)
        if self._mapped > MAPPED:
            self.__exit__()
        if stored.file not in self._open:
            self._open[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
        tensor: Tensor = self._open[stored.file].get_tensor(stored.name)
        self._mapped += tensor.numel() * tensor.element_size()
        return from_original(tensor, stored.form)
