"""The donor: what gives text encoders, tokenizers, scheduler and VAE to experts that are denoisers alone.

It is the first expert that has them, a pipeline's folder (the frame), or files of the parts: text encoders,
which are told apart by their tensors and read with the configs of a frame or with those that ship.
Tokenizers, CLIP's excepted, come from a frame. A hub id is enough: no weights of it are downloaded.

A file that holds text encoders and a VAE beside its transformer gives them itself. What the user names for
a part goes first, then the expert's own file, the frame, and other experts' files. Where the experts of a
family share their text encoders, the first file that holds one gives it to all.
"""

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.component import Component
from afa.experts.description import pipeline_components
from afa.experts.expert import TEXT_ENCODERS, TOKENIZERS, Expert, pipeline_options
from afa.experts.headers import read_file, same_bytes
from afa.experts.layouts import vae_layout
from afa.experts.locate import Located, locate, locate_frame
from afa.experts.parts import (
    PROCESSOR,
    has_part,
    load_part,
    load_tokenizers_of,
    read_index,
)
from afa.experts.prediction import warn_once
from afa.experts.shipped import HUB_IDS
from afa.experts.single_file import load_tokenizers
from afa.experts.spec import ExpertSpec
from afa.experts.text_names import KINDS, TextEncoderFile, text_encoder_in, text_encoders_beside
from afa.experts.vae import configs_of, describe_vae
from afa.models.registry import FAMILIES


@dataclass(frozen=True)
class DonorSpec:
    """What the user gives for experts that are denoisers alone.

    frame:         a pipeline's folder, or a hub id of which configs and tokenizers are read; None: neither
    text_encoders: files or folders of text encoders, in any order
    vae:           an expert's name or a place, which then is not missing; None: none is chosen
    files:         the experts' files, which may hold text encoders and a VAE beside the transformer
    """

    frame: str | None = None
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None
    files: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return self.frame is not None or bool(self.text_encoders)

    @property
    def named(self) -> str:
        """What error messages call it."""
        given = self.text_encoders or tuple(map(str, self.files))
        return f"frame '{self.frame}'" if self.frame else f"text encoder {', '.join(given)}"


NO_DONOR = DonorSpec()


@dataclass
class DonorDescription:
    """A donor before its weights are read.

    spec:       what the user gave
    located:    of its configs
    index:      the content of model_index.json
    components: its text encoders by their names in a pipeline, and its VAE if it has one
    tokenizers: one for each text encoder
    scheduler:  of the pipeline
    files:      the places of the text encoders that the user gives, by their names in a pipeline
    beside:     the text encoders in experts' files, read or not
    lacking:    the sentence that names all that is missing; None: nothing
    """

    spec: DonorSpec
    located: Located
    index: dict[str, Any]
    components: dict[str, Component]
    tokenizers: list[Any]
    scheduler: Any
    files: dict[str, str] = field(default_factory=dict)
    beside: dict[Path, dict[str, TextEncoderFile]] = field(default_factory=dict)
    lacking: str | None = None

    @property
    def text_encoders(self) -> list[Component]:
        """Its text encoders, in the pipeline's order."""
        return [component for name, component in self.components.items() if name != "vae"]

    def warn_of_unread(self, file: Path) -> None:
        """Warn of the text encoders in an expert's file that differ from those which are read instead."""
        for name, encoder in self.beside.get(file, {}).items():
            used = self.components[name]
            own = replace(used, weights=file, layout=encoder.layout)
            if name not in self.files and used.weights != file and not same_bytes(own.tensors, used.tensors):
                warn_once(
                    f"the {name} in {file} is not read: experts of this family share their text encoders, "
                    f"and it is not the same as the first one, in {used.weights}"
                )

    def expert(self, encoders: Sequence[Any]) -> Expert:
        """The donor with these text encoders, as an expert without a denoiser."""
        return Expert(
            name=self.located.spec.name,
            model=None,
            text_encoders=list(encoders),
            tokenizers=list(self.tokenizers),
            scheduler=self.scheduler,
            vae_component=self.components.get("vae"),
            pipeline=self.index["_class_name"],
            pipeline_options=pipeline_options(self.index),
            located=None if self.spec.frame is None else self.located,
            donor_files=dict(self.files),
        )


def describe_donor(spec: DonorSpec, like: Expert) -> DonorDescription:
    """Describe the donor that a user gives.

    like: an expert that it gives its parts to
    Raises UserError, with everything that is missing, for parts that are not there; for a file that is no
    text encoder, or none of the model's; and for a tokenizer that has more tokens than its text encoder.
    """
    found = gather(spec, like)
    if found.lacking is not None:
        raise UserError(found.lacking)
    return found


def gather(spec: DonorSpec, like: Expert) -> DonorDescription:
    """Describe a donor with the parts that are there. Arguments: see describe_donor.

    Raises UserError as describe_donor does, but for what is missing, which the description names.
    """
    located = _configs(spec, like)
    folder, index = located.path, read_index(located.path)
    wanted = {name: _config_of(folder, index, name) for name in TEXT_ENCODERS if has_part(index, name)}
    if not wanted:
        raise UserError(
            f"{spec.named} has no text encoders; give the folder of a whole text-to-image pipeline"
        )
    named = _assigned(spec, wanted, index)
    own = files_of([like])
    files = dict.fromkeys((*spec.files, *own) if shares_texts(like) else (*own, *spec.files))
    beside = {file: _beside(file, wanted) for file in files}
    first = ChainMap(named, *(beside[file] for file in (files if shares_texts(like) else own)))
    found = {name: _from_file(one, wanted[name]) for name, one in first.items()}
    if spec.frame is not None:
        parts = [name for name in (*wanted, "vae") if has_part(index, name) and _has_weights(folder / name)]
        found = pipeline_components(folder, index, parts) | found
    others = ChainMap(*beside.values())
    found |= {name: _from_file(one, wanted[name]) for name, one in others.items() if name not in found}
    with_vae = next((file for file in files if vae_layout(read_file(file)) is not None), None)
    if spec.vae is None and with_vae is not None:
        found["vae"] = describe_vae(locate(ExpertSpec("vae", str(with_vae))), str(folder), like)
    lacking = [name for name in wanted if name not in found]
    if lacking == ["text_encoder_3"] and any(beside.values()):
        warn_once(
            f"{', '.join(map(str, files))} has no {_title(wanted[lacking[0]])}; prompts are read without it, "
            "as SD 3 was trained to allow: give it with --text-encoder FILE (in Python text_encoders=)"
        )
        index = {**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        lacking = []
    tokenizers = _tokenizers(spec, folder, index)
    no_vae = "vae" not in found and spec.vae is None and (spec.frame is None or bool(spec.text_encoders))
    texts, missing = [_title(wanted[name]) for name in lacking], None
    if lacking or tokenizers is None or no_vae:
        missing = _missing(like, texts, tokenizers is None, no_vae, located)
    else:
        for name, tokenizer in zip((name for name in wanted if name in found), tokenizers, strict=False):
            _check_vocabulary(tokenizer, found[name], folder)
    return DonorDescription(
        spec,
        located,
        index,
        {name: found[name] for name in (*wanted, "vae") if name in found},
        tokenizers or [],
        load_part(folder, "scheduler"),
        {name: str(file.place) for name, file in named.items()},
        beside,
        missing,
    )


def files_of(experts: Sequence[Expert | None]) -> tuple[Path, ...]:
    """The experts' single files, which may hold text encoders and a VAE beside the denoiser."""
    there = (one.located for one in experts if one is not None and one.located is not None)
    return tuple(located.path for located in there if located.single_file)


def shares_texts(expert: Expert | None) -> bool:
    """Whether all experts of its family have the same text encoders."""
    return expert is not None and not FAMILIES[expert.family].interface.concat_text


def lacks(expert: Expert) -> str:
    """The sentence that names all that a denoiser alone lacks, and how to give it."""
    if configs_of(expert) is not None and (missing := gather(NO_DONOR, expert).lacking) is not None:
        return missing
    return (
        f"expert '{expert.name}' is a denoiser alone, and lacks text encoders, tokenizers, a scheduler "
        "and a VAE; give a pipeline's folder that has them: --frame FOLDER (in Python frame=)"
    )


def _missing(expert: Expert, texts: Sequence[str], tokenizers: bool, vae: bool, configs: Located) -> str:
    """What is missing, and the options that give it.

    texts:      the text encoders
    tokenizers: whether they are missing
    vae:        whether it is missing
    configs:    where the configs are from
    """
    hub = HUB_IDS.get(configs.path.name)
    frame = f"--frame {hub}" if hub else "--frame FOLDER-OR-HUB-ID"
    parts = [
        *(f"the text encoder {text}" for text in texts),
        *(["the tokenizers"] if tokenizers else []),
        *(["a VAE"] if vae else []),
    ]
    options = [
        *([f"--text-encoder {' '.join(['FILE'] * len(texts))}"] if texts else []),
        *([f"{frame} (its configs and tokenizers are read, a few MB)"] if tokenizers else []),
        *(["--vae FILE"] if vae else []),
    ]
    named = (("text_encoders=", bool(texts)), ("frame=", tokenizers), ("vae=", vae))
    python = ", ".join(name for name, given in named if given)
    return (
        f"expert '{expert.name}' is a denoiser alone, and lacks {_listed(parts)}; give {_listed(options)} "
        f"(in Python {python}), or as --frame the folder of a whole pipeline"
    )


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@dataclass(frozen=True)
class _Wanted:
    """A text encoder that a pipeline has. component: its class and settings; kind: of KINDS"""

    component: Component
    kind: str

    @property
    def width(self) -> int:
        """The width of its states."""
        settings = self.component.settings
        text = settings.get("text_config", settings)
        return int(text.get("hidden_size") or text.get("d_model") or 0)


def _title(wanted: _Wanted) -> str:
    return f"{wanted.kind} of width {wanted.width:,}"


def _configs(spec: DonorSpec, like: Expert) -> Located:
    """Where the configs of a donor are: its frame, or those that ship for the expert."""
    if spec.frame is not None:
        return locate_frame(spec.frame)
    folder = configs_of(like)
    if folder is None:
        raise UserError(
            f"{spec.named}: it is not known which model expert '{like.name}' is; give --frame "
            "FOLDER-OR-HUB-ID, whose configs and tokenizers are read, or --config (in Python frame=, config=)"
        )
    # no name of an expert has a colon
    return Located(ExpertSpec(f"config:{folder.name}", str(folder)), folder)


def _config_of(folder: Path, index: dict[str, Any], name: str) -> _Wanted:
    component = pipeline_components(folder, index, (name,))[name]
    kind = KINDS.get(component.kind.config_class.model_type, component.kind.__name__)
    return _Wanted(component, kind)


def _assigned(
    spec: DonorSpec, wanted: dict[str, _Wanted], index: dict[str, Any]
) -> dict[str, TextEncoderFile]:
    """The given text encoders by their names in the pipeline. Raises UserError for one that has no place."""
    found: dict[str, TextEncoderFile] = {}
    for place in spec.text_encoders:
        file = text_encoder_in(Path(place))
        fitting = [name for name, one in wanted.items() if (one.kind, one.width) == (file.kind, file.width)]
        free = next((name for name in fitting if name not in found), None)
        if free is None and fitting:
            raise UserError(
                f"--text-encoder {found[fitting[-1]].place} and {place} are both {file}, and a "
                f"{index['_class_name']} reads one; leave one out"
            )
        if free is None:
            reads = _listed([f"a {_title(one)}" for one in wanted.values()])
            raise UserError(
                f"--text-encoder {place} is {file}, and a {index['_class_name']} reads {reads}; give the "
                "text encoder that the expert was trained with"
            )
        found[free] = file
    return found


def _beside(file: Path, wanted: dict[str, _Wanted]) -> dict[str, TextEncoderFile]:
    """The text encoders beside the denoiser in an expert's file, by their names in the pipeline."""
    there = {(one.kind, one.width): one for one in text_encoders_beside(file)}
    kinds = {name: (one.kind, one.width) for name, one in wanted.items()}
    return {name: there[kind] for name, kind in kinds.items() if kind in there}


def _from_file(file: TextEncoderFile, wanted: _Wanted) -> Component:
    """The component of a text encoder in a file, with the class and settings of the pipeline's."""
    whole = wanted.component
    settings = file.settings(whole.settings, str(whole.config / "config.json"))
    change = partial(file.reduce, shortened=settings != dict(whole.settings))
    return replace(whole, settings=settings, weights=file.place, layout=file.layout, change=change)


def _has_weights(folder: Path) -> bool:
    """Whether a component's folder has weights, be it such as its reader refuses."""
    suffixes = (".safetensors", ".bin", ".pt", ".ckpt")
    return folder.is_dir() and any(path.suffix in suffixes for path in folder.iterdir())


def _tokenizers(spec: DonorSpec, folder: Path, index: dict[str, Any]) -> list[Any] | None:
    """The tokenizers of a folder of configs, or CLIP's, which ship; None if others are missing."""
    names = [name for name in TOKENIZERS if has_part(index, name)]
    there = [name for name in names or [PROCESSOR] if (folder / name).is_dir()]
    if there and len(there) == len(names or [PROCESSOR]):
        return load_tokenizers_of(folder, index)
    clip = all(index[name][1].startswith("CLIPTokenizer") for name in names)
    if spec.frame is None and names and clip:
        return list(load_tokenizers(folder).values())
    return None


def _check_vocabulary(tokenizer: Any, encoder: Component, folder: Path) -> None:
    """Raise UserError for a tokenizer with more tokens than its text encoder has vectors."""
    text = encoder.settings.get("text_config", encoder.settings)
    size = text.get("vocab_size")
    if isinstance(size, int) and len(tokenizer) > size:
        raise UserError(
            f"the tokenizer of {folder} has {len(tokenizer):,} tokens, and the text encoder "
            f"{encoder.weights} reads {size:,}; give as frame (--frame) the model that the text encoder is of"
        )
