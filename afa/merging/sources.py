"""An expert as a merge reads it: every tensor by its name in a diffusers pipeline, wherever and in whichever
layout it lies.

Experts are found, described and checked by afa.experts; nothing is loaded. A tensor is read when its turn
comes, with the expert's LoRAs folded in.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afa.denoiser.lora import OWN, activate
from afa.denoiser.lora_layers import lora_states
from afa.errors import UserError
from afa.experts.component import Component
from afa.experts.description import ExpertDescription, describe_expert
from afa.experts.dtypes import is_float
from afa.experts.expert import TEXT_ENCODERS, Expert
from afa.experts.folders import read_object
from afa.experts.headers import Entry, Tensors, current_name, is_position_ids, read_file, tied
from afa.experts.layouts import OPEN_CLIP
from afa.experts.locate import Located, locate
from afa.experts.lora import attach, fuse, holds_differences, read_lora
from afa.experts.lora_differences import Difference, find_differences
from afa.experts.prediction import is_prediction_key
from afa.experts.single_file import config_folder
from afa.experts.spec import ExpertSpec, Lora
from afa.experts.tensors import TensorReader
from afa.experts.transformer_places import Place, from_original, shape_from_original
from afa.experts.vae import describe_vae
from afa.merging.keys import key_stages
from afa.merging.single_file import original_places
from afa.models.registry import layers_of
from afa.places import as_typed

EMA = "model_ema."
UNDONE = "bfloat16"  # of a merge of weights that were in 8 bits or fewer, and so have fewer digits


@dataclass(frozen=True)
class Stored:
    """One tensor of an expert: in which file, where there and in which form; the type in which a merge writes
    it, which is the file's own, and its shape as diffusers has it."""

    entry: Entry
    place: Place
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, entry: Entry, place: Place) -> "Stored":
        dtype = UNDONE if entry.undone else entry.dtype
        return cls(entry, place, dtype, shape_from_original(entry.shape, place))

    @property
    def file(self) -> Path:
        return self.entry.file

    @property
    def name(self) -> str:
        return self.place.key

    @property
    def is_float(self) -> bool:
        return is_float(self.dtype)

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass
class FileSource:
    """An expert, a base or a VAE, as its files have it.

    tensors:     by "part.name"
    config:      folder of configs: the expert's own, or the one that a single file is read with
    spare:       what else a single file holds; never its EMA copy, nor the tensors that say what it predicts,
                 which are written anew
    description: of an expert; a VAE has none
    loras:       by the name of a layer, "part.layer"
    given:       their files
    """

    name: str
    located: Located
    tensors: dict[str, Stored]
    config: Path
    spare: dict[str, Stored] = field(default_factory=dict)
    description: ExpertDescription | None = None
    loras: dict[str, "LayerLoras"] = field(default_factory=dict)
    given: tuple[Lora, ...] = ()

    @property
    def place(self) -> str:
        """Where it is, for a reader."""
        return as_typed(str(self.located.path))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that it has weights of, the denoiser first."""
        return tuple(dict.fromkeys(key.partition(".")[0] for key in self.tensors))

    def of(self, part: str) -> dict[str, Stored]:
        """The tensors of one part, by their names in it."""
        keys = {key: key.removeprefix(f"{part}.") for key in self.tensors}
        return {name: self.tensors[key] for key, name in keys.items() if name != key}

    @property
    def denoiser(self) -> str:
        return self.parts[0]

    @property
    def expert(self) -> Expert:
        """An expert on the meta device; not of a VAE."""
        assert self.description is not None
        return self.description.expert

    @property
    def model(self) -> nn.Module:
        """An expert's denoiser, without its numbers."""
        return self.expert.model

    @property
    def alone(self) -> bool:
        """Whether it is a denoiser's single file without text encoders."""
        return self.located.single_file and not self.located.whole_pipeline

    @cached_property
    def stages(self) -> dict[str, str]:
        """The stage of every tensor of an expert."""
        return key_stages(self.tensors, self.model)

    def read(self, key: str, reader: "Reader") -> Tensor:
        """One tensor in its diffusers form, in the file's type; in float32 where a LoRA changes it."""
        layer, _, end = key.rpartition(".")
        if layer not in self.loras or not self.loras[layer].changes(end):
            return self.plain(key, reader)
        keys = {name: f"{layer}.{name}" for name in ("weight", "bias")}
        own = {name: self.plain(key, reader) for name, key in keys.items() if key in self.tensors}
        return self.loras[layer].folded(own, f"'{self.name}': {key}")[end]

    def plain(self, key: str, reader: "Reader") -> Tensor:
        """One tensor without LoRAs."""
        return reader.read(self.tensors[key])

    def files(self, part: str) -> list[Path]:
        """The files that a part's weights are in."""
        return sorted({stored.file for stored in self.of(part).values()})

    def floats(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what can be merged: all but whole numbers."""
        return {key: stored.shape for key, stored in self.tensors.items() if stored.is_float}

    def origin(self, part: str) -> "FileSource":
        """What a part's configs come from."""
        return self

    def open_clip(self, part: str) -> bool:
        """Whether a text encoder was OpenCLIP's: SDXL's second, and SD 2.x'.

        Of the latter, a single file's names tell, and in a folder the activation.
        """
        if "text_encoder_2" in self.parts:
            return part == "text_encoder_2"
        if self.located.single_file:
            return any(stored.name.startswith(OPEN_CLIP) for stored in self.of(part).values())
        return read_object(self.config / part / "config.json").get("hidden_act") == "gelu"


class LayerLoras:
    """The LoRAs of one layer, folded into its weight as the loaded expert has them: by peft, in float32."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        # factors by peft's names, alpha in them, or a difference and the layer's place in it; strength
        self.added: list[tuple[dict[str, Tensor] | tuple[Difference, int], float]] = []

    def changes(self, end: str) -> bool:
        """Whether the layer's `weight` or `bias` is another with them."""
        held = [one[0].tensors if isinstance(one, tuple) else one for one, _ in self.added]
        biased = any("lora_B.bias" in names or "diff_b" in names for names in held)
        return end == "weight" or (end == "bias" and biased)

    def folded(self, tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        """The layer's own tensors -> with the LoRAs in them. what: for messages."""
        if not any(isinstance(one, tuple) for one, _ in self.added):
            return self._with_loras(tensors, self.added, what)
        for one, strength in self.added:
            if isinstance(one, tuple):
                tensors = one[0].of_one(one[1], tensors, strength)
            else:
                tensors = self._with_loras(tensors, [(one, strength)], what)
        return tensors

    def _with_loras(
        self, tensors: dict[str, Tensor], added: Sequence[tuple[Any, float]], what: str
    ) -> dict[str, Tensor]:
        holder: Any = nn.Module()
        holder.dtype = torch.float32
        holder.layer = copy.deepcopy(self.layer)
        for end, tensor in tensors.items():
            holder.layer._parameters[end] = nn.Parameter(
                tensor.to(torch.float32, copy=True), False
            )  # peft adds in place
        names = [f"{OWN}{index}" for index in range(len(added))]
        for name, (state, _) in zip(names, added, strict=True):
            attach(holder, {f"layer.{end}": tensor for end, tensor in state.items()}, name)
        activate(holder, names, [strength for _, strength in added])
        try:
            fuse(holder)
        except UserError:
            raise UserError(
                f"{what} does not fit float32 with the LoRA in it; make the LoRA weaker"
            ) from None
        except RuntimeError as error:  # peft: a bias for a layer that has none
            raise UserError(f"{what} cannot take the LoRA: {error}") from None
        return {end: getattr(holder.layer, end).data for end in tensors}


def add_loras(source: FileSource, loras: tuple[Lora, ...]) -> FileSource:
    """The source with LoRA files folded into what is read.

    Raises UserError for one that does not fit, or is another kind.
    """
    if not loras:
        return source
    if not source.located.whole_pipeline:
        only = f"{source.located.path} is only a denoiser"
        raise UserError(f"expert '{source.name}': a LoRA needs a whole pipeline to join, and {only}")
    assert source.description is not None
    models, text = source.description.parts, source.description.text_parts
    parts = {part: models[part] for part in (source.denoiser, *text)}
    for lora in loras:
        what, tensors, config = read_lora(lora.path)
        if holds_differences(lora):
            for part, difference in find_differences(tensors, parts, what, f"expert '{source.name}'"):
                for place, name in enumerate(difference.layers.names):
                    known = LayerLoras(difference.modules[place])
                    known = source.loras.setdefault(f"{part}.{current_name(name)}", known)
                    known.added.append(((difference, place), lora.strength))
            continue
        states = lora_states(tensors, parts, what, f"expert '{source.name}'", layers_of, config)
        for part, state in states.items():
            layers: dict[str, dict[str, Tensor]] = {}
            for key, tensor in state.items():
                layer, _, end = key.partition(".lora_")
                layers.setdefault(layer, {})[f"lora_{end}"] = tensor
            for layer, own in layers.items():
                known = LayerLoras(parts[part].get_submodule(layer))
                known = source.loras.setdefault(f"{part}.{current_name(layer)}", known)
                known.added.append((own, lora.strength))
    source.given = loras
    return source


def open_source(
    spec: ExpertSpec, config: str | None = None, description: ExpertDescription | None = None
) -> FileSource:
    """Find an expert's tensors, without reading them.

    config:      of a single file, as in load_expert
    description: what describe_expert(spec, config) returned, where it is known
    Raises UserError if it cannot be found, is broken, incomplete or pickled, or if a LoRA does not fit it.
    """
    located = locate(spec)
    if description is None:
        description = describe_expert(spec, config)
    tensors: dict[str, Stored] = {}
    for component in description.components.values():
        tensors |= tensors_of(
            component, description.expert.model, xl="text_encoder_2" in description.components
        )
    spare: dict[str, Stored] = {}
    if located.single_file:
        used = {stored.name for stored in tensors.values()}
        spare = {
            name: Stored.of(entry, Place(name))
            for name, entry in read_file(located.path).items()
            if not (name in used or name.startswith(EMA) or is_prediction_key(name))
        }
    source = FileSource(spec.name, located, tensors, description.folder, spare, description)
    return add_loras(source, spec.loras)


def open_vae(place: str | ExpertSpec, like: FileSource, config: str | None = None) -> FileSource:
    """The source of a VAE: an expert's, a VAE's own folder, or its own file.

    like:   an expert that the VAE is to serve
    config: of a single file, as in load_expert
    Raises UserError if there is none, or one of another kind.
    """
    spec = ExpertSpec.parse(place) if isinstance(place, str) else place
    located = locate(spec)
    if located.whole_pipeline:
        source = open_source(replace(spec, loras=()), config)
        if "vae" not in source.parts:
            raise UserError(f"'{spec.name}' has no VAE; choose another with --vae")
        return source
    folder = located.path
    if located.single_file:
        folder = like.config if config is None else config_folder(config)
    elif (kind := read_object(folder / "config.json").get("_class_name")) != "AutoencoderKL":
        raise UserError(f"{folder} is no VAE (its config.json says {kind})")
    vae = describe_vae(located, config, like.expert)
    return FileSource(spec.name, located, tensors_of(vae), folder)


def tensors_of(component: Component, denoiser: Any = None, xl: bool = False) -> dict[str, Stored]:
    """A component's tensors by "part.name", each once, though a file may hold one under two names.

    denoiser: of the pipeline, on the meta device
    xl:       whether it is of an SDXL pipeline
    """
    part, layout, entries = component.name, component.layout, component.tensors
    state = {current_name(name): tensor.shape for name, tensor in component.model.state_dict().items()}
    found: dict[str, Stored] = {}
    if layout is None:  # a folder
        same = tied(component.model)
        for name, entry in entries.items():
            key = same.get(current_name(name), current_name(name))
            found.setdefault(key, Stored.of(entry, Place(name)))
    elif layout.diffusers:
        names = {current_name(name.removeprefix(layout.prefix)): name for name in entries}
        found = {name: _stored(entries, Place(names[name])) for name in state}
    else:
        text = part in TEXT_ENCODERS
        opened = text and any(name.startswith(OPEN_CLIP) for name in entries)
        try:
            places = original_places(part, state, denoiser, xl=xl, open_clip=opened)
        except ValueError as error:
            raise UserError(f"{component.where}: {error}; merge diffusers folders of these models") from None
        for name, place in places.items():
            found[name] = _stored(entries, place if text else replace(place, key=layout.own(place.key)))
    return {f"{part}.{name}": stored for name, stored in found.items()}


def _stored(entries: Tensors, place: Place) -> Stored:
    """A tensor at its place, allowing for what the oldest files have otherwise."""
    key = place.key if place.key in entries else place.key.replace(".text_model.", ".")
    entry = entries[key]
    form = "same" if place.form == "conv" and len(entry.shape) == 2 else place.form
    return Stored.of(entry, Place(key, form, place.rows))


class Reader(TensorReader):
    """Tensors from memory-mapped files, which stay open while it is used: with Reader() as reader:
    reader.read(stored)."""

    def __init__(self) -> None:
        super().__init__(remap=True)

    def read(self, stored: Stored) -> Tensor:
        """One tensor, in its diffusers form and in the file's type; position_ids as they should be, whatever
        the file has; in float32 what was in 8 bits with scales, or in blocks of GGUF."""
        if is_position_ids(stored.name):
            return torch.arange(stored.numbers).reshape(stored.shape)
        return from_original(self.tensor(stored.entry), stored.place)
