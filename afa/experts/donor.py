"""The donor: what gives text encoders, tokenizers, scheduler and VAE to experts that are denoisers alone.

It is the first expert that has them, a pipeline's folder (the frame), or files of the parts: text encoders,
which are told apart by their tensors and read with the configs of a frame or with those that ship.
Tokenizers, CLIP's excepted, come from a frame. A hub id is enough: no weights of it are downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afa.errors import UserError
from afa.experts.component import Component
from afa.experts.description import ExpertDescription, pipeline_components
from afa.experts.expert import TEXT_ENCODERS, TOKENIZERS, Expert, pipeline_options
from afa.experts.headers import check_finite
from afa.experts.locate import Located, locate, locate_frame
from afa.experts.parts import (
    PROCESSOR,
    has_part,
    load_part,
    load_tokenizers_of,
    read_index,
)
from afa.experts.prediction import predicting
from afa.experts.shipped import HUB_IDS
from afa.experts.single_file import load_tokenizers
from afa.experts.spec import ExpertSpec, exists
from afa.experts.text_names import KINDS, TextEncoderFile, text_encoder_in
from afa.experts.vae import configs_of, describe_vae
from afa.models.registry import FAMILIES


@dataclass(frozen=True)
class DonorSpec:
    """What the user gives for experts that are denoisers alone.

    frame:         a pipeline's folder, or a hub id of which configs and tokenizers are read; None: neither
    text_encoders: files or folders of text encoders, in any order
    vae:           an expert's name or a place, which then is not missing; None: none is chosen
    """

    frame: str | None = None
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None

    def __bool__(self) -> bool:
        return self.frame is not None or bool(self.text_encoders)

    @property
    def named(self) -> str:
        """What error messages call it."""
        return f"frame '{self.frame}'" if self.frame else f"text encoder {', '.join(self.text_encoders)}"


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
    files:      the places of text encoders that are not the frame's own, by their names in a pipeline
    """

    spec: DonorSpec
    located: Located
    index: dict[str, Any]
    components: dict[str, Component]
    tokenizers: list[Any]
    scheduler: Any
    files: dict[str, str] = field(default_factory=dict)

    @property
    def text_encoders(self) -> list[Component]:
        """Its text encoders, in the pipeline's order."""
        return [component for name, component in self.components.items() if name != "vae"]

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
    located = _configs(spec, like)
    folder, index = located.path, read_index(located.path)
    names = [name for name in TEXT_ENCODERS if has_part(index, name)]
    if not names:
        raise UserError(
            f"{spec.named} has no text encoders; give the folder of a whole text-to-image pipeline"
        )
    wanted = {name: _config_of(folder, index, name) for name in names}
    given = _assigned(spec, wanted, index)
    found: dict[str, Component] = {}
    for name in names:
        if name in given:
            found[name] = _from_file(given[name], wanted[name])
        elif spec.frame is not None and _has_weights(folder / name):
            found |= pipeline_components(folder, index, (name,))
    tokenizers = _tokenizers(spec, folder, index)
    if spec.frame is not None and has_part(index, "vae") and _has_weights(folder / "vae"):
        found |= pipeline_components(folder, index, ("vae",))
    lacking = [name for name in names if name not in found]
    no_vae = bool(spec.text_encoders) and spec.vae is None and "vae" not in found
    if lacking or tokenizers is None or no_vae:
        texts = [_title(wanted[name]) for name in lacking]
        raise UserError(_missing(like, texts, tokenizers is None, no_vae, located))
    for name, tokenizer in zip(names, tokenizers, strict=False):
        _check_vocabulary(tokenizer, found[name], folder)
    scheduler = load_part(folder, "scheduler")
    files = {name: str(file.place) for name, file in given.items()}
    return DonorDescription(spec, located, index, found, tokenizers, scheduler, files)


def lacks(expert: Expert) -> str:
    """The sentence that names all that a denoiser alone lacks, and how to give it."""
    folder = configs_of(expert)
    if folder is None:
        return (
            f"expert '{expert.name}' is a denoiser alone, and lacks text encoders, tokenizers, a scheduler "
            "and a VAE; give a pipeline's folder that has them: --frame FOLDER (in Python frame=)"
        )
    index = read_index(folder)
    names = [name for name in TEXT_ENCODERS if has_part(index, name)]
    texts = [_title(_config_of(folder, index, name)) for name in names]
    located = Located(ExpertSpec("", ""), folder)
    bare = _tokenizers(DonorSpec(), folder, index) is None
    return _missing(expert, texts, bare, True, located)


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


def load_donor(spec: DonorSpec, like: Expert, dtype: torch.dtype | None) -> Expert:
    """Load a donor. Arguments and errors: see describe_donor; and for weights that are not finite."""
    described = describe_donor(spec, like)
    encoders = []
    for component in described.text_encoders:
        encoder = component.load(dtype or torch.float32)
        check_finite(encoder, f"the {component.name} of {described.files.get(component.name) or spec.named}")
        encoders.append(encoder)
    return described.expert(encoders)


def borrow_components(experts: Sequence[Expert], spec: DonorSpec, dtype: torch.dtype | None) -> Expert | None:
    """Give denoisers alone the text encoders, tokenizers and scheduler of a donor.

    spec: of the donor; empty: the first expert that has text encoders
    Returns the donor; None if no expert needs one, or there is none, and denoisers alone stay what they are.
    Raises UserError for a donor that lacks parts, or that no expert needs.
    """
    bare = [expert for expert in experts if not expert.text_encoders]
    if spec and not bare:
        raise unneeded(spec)
    if spec:
        has_vae = next((expert.name for expert in experts if expert.has_vae), None)
        donor: Expert | None = load_donor(replace(spec, vae=spec.vae or has_vae), bare[0], dtype)
    else:
        donor = next((expert for expert in experts if expert.text_encoders), None)
    if donor is None or not bare:
        return None
    for expert in bare:
        expert.donor = donor
        expert.text_encoders, expert.tokenizers = list(donor.text_encoders), list(donor.tokenizers)
        expert.scheduler = expert.scheduler or donor_scheduler(expert, donor.scheduler)
        _check_options(expert, donor)
        expert.pipeline_options = dict(donor.pipeline_options)
    return donor


def _check_options(expert: Expert, donor: Expert) -> None:
    """Raise UserError if a transformer's file is said to be another model than the pipeline that it joins."""
    if not expert.pipeline_options:
        return
    settings = replace(expert, pipeline_options=donor.pipeline_options).settings
    for name in FAMILIES[expert.family].interface.pipeline_settings:
        its, expected = expert.settings.get(name), settings.get(name)
        if its != expected:
            raise UserError(
                f"expert '{expert.name}' is read as a model with {name} {its}, and '{donor.name}', which "
                f"lends it text encoders and scheduler, has {expected}; give the pipeline of its own kind "
                "with --frame, or the config of that pipeline with --config"
            )


def unneeded(spec: DonorSpec) -> UserError:
    """The error for a donor where all experts have text encoders."""
    return UserError(
        f"{spec.named} gives components to experts that are denoisers alone, and all of these bring "
        "their own; leave it out, or choose another VAE with vae (--vae)"
    )


def lend(description: ExpertDescription, spec: DonorSpec, config: str | None) -> ExpertDescription:
    """The description of a denoiser alone with the parts that a donor gives it.

    config: of a VAE that is a single file
    Raises UserError as describe_donor does, and for a VAE that does not fit.
    """
    expert = description.expert
    found = describe_donor(spec, expert)
    components = {**description.components, **found.components}
    if spec.vae is not None and exists(spec.vae):
        components["vae"] = describe_vae(
            locate(ExpertSpec("vae", spec.vae)), config, replace(expert, donor=found.expert([]))
        )
    return replace(
        description,
        components=components,
        tokenizers=found.tokenizers,
        index=description.index or found.index,
        scheduler=description.scheduler or donor_scheduler(expert, found.scheduler),
    )


def donor_scheduler(expert: Expert, scheduler: Any) -> Any:
    """A donor's scheduler, changed to the kind of prediction that the expert's own file names."""
    if scheduler is None:
        return None
    return predicting(scheduler, expert.prediction, f"expert '{expert.name}'")
