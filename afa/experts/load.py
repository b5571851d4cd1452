"""From located files to an expert in memory: the denoiser, its text encoders, tokenizers and scheduler; a VAE on demand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.errors import UserError
from afa.experts.adapters import add_own, fuse, load_sharing
from afa.experts.components import read_component, read_vae
from afa.experts.finite import check_finite
from afa.experts.known import KnownParts
from afa.experts.locate import Located, locate
from afa.experts.original import config_of, load_tokenizers, scheduler_of
from afa.experts.parts import component_of, first_line, has_part, load_part, read_index
from afa.experts.prediction import Prediction, flow_only, folder_scheduler
from afa.experts.spec import ExpertSpec
from afa.families.table import FAMILIES, family_of

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass
class Expert:
    """One frozen source model.

    model: the denoiser; None for a lender that is no expert. text_encoders, tokenizers: in the pipeline's order; empty if only a
    denoiser was given. located: where it came from; None if it was handed over as an object. config: of a single file.
    pipeline: the class it was, or would be, loaded with. lender: whose text encoders, tokenizers, scheduler and VAE it uses, if it
    is a denoiser alone (see lending.py). said: what such a one, or its user, says that it predicts.
    """

    name: str
    model: Any
    text_encoders: list[Any] = field(default_factory=list)
    tokenizers: list[Any] = field(default_factory=list)
    scheduler: Any = None
    vae: nn.Module | None = None
    pipeline: str | None = None
    pipeline_options: dict[str, Any] = field(default_factory=dict)
    located: Located | None = None
    config: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)  # of its files, once they have been computed
    lender: "Expert | None" = None
    said: Prediction = field(default_factory=Prediction)

    @property
    def family(self) -> str:
        return family_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser; of a lender, of what it lends."""
        found: torch.dtype = next((self.model or self.text_encoders[0]).parameters()).dtype
        return found

    @property
    def has_vae(self) -> bool:
        """Whether there is one in its files, or handed over with it."""
        return self.vae is not None or (self.located is not None and self.located.whole_pipeline)

    def load_vae(self) -> nn.Module:
        """The expert's VAE, or its lender's, read on the first call. Raises UserError if there is none."""
        if self.vae is None and self.located is not None and self.located.whole_pipeline:
            self.vae = load_vae(self.located, self.config, self.dtype)
        if self.vae is None and self.lender is not None:
            return self.lender.load_vae()
        if self.vae is None:
            raise UserError(f"expert '{self.name}' has no VAE; give one with vae=")
        return self.vae


def load_expert(
    source: object, dtype: torch.dtype | None = None, config: str | None = None, known: KnownParts | None = None
) -> Expert:  # fmt: skip
    """An expert from a string (see ExpertSpec), a spec, a diffusers pipeline, or a bare denoiser; an Expert is one already.

    config: for a single file, the name of a shipped config or a folder of configs; found out by default. known: parts of other
    experts, of which equal ones are taken instead of being loaded again.
    Raises UserError if it cannot be found, read, or be an expert, or if its weights hold NaN or infinity.
    """
    if isinstance(source, Expert):
        return source
    if isinstance(source, (str, Path)):
        source = ExpertSpec.parse(str(source))
    if isinstance(source, ExpertSpec):
        expert = _from_files(locate(source), dtype or torch.float32, config, known or KnownParts())
    elif isinstance(source, nn.Module):
        expert = Expert(name="", model=source)
    elif hasattr(source, "components"):
        expert = _from_pipeline(source)
    else:
        raise UserError(f"a {type(source).__name__} cannot be an expert; give a path, a hub id, a diffusers pipeline or a denoiser")
    where = f"the expert given as a {type(source).__name__}"
    if isinstance(source, ExpertSpec):
        where = f"expert '{source.name}' ({str(source).partition('=')[2]})"
    for module in (expert.model, *expert.text_encoders):
        check_finite(module, f"{where}, {type(module).__name__}")
    return expert


def load_experts(
    sources: Sequence[object], dtype: torch.dtype | None = None, config: str | None = None, prediction_type: str | None = None
) -> list[Expert]:  # fmt: skip
    """Load several, and give every one a name of its own; those on one base share its weights (see adapters).

    Raises UserError for two of one name, before loading.
    """
    specs = [ExpertSpec.parse(str(source), prediction_type) if isinstance(source, (str, Path)) else source for source in sources]
    check_names([spec for spec in specs if isinstance(spec, ExpertSpec)])
    known = KnownParts()
    experts = load_sharing(specs, lambda source: load_expert(source, dtype, config, known))
    for index, expert in enumerate(experts):
        expert.name = expert.name or f"expert_{index}"
    return experts


def check_names(specs: Sequence[ExpertSpec]) -> None:
    """Raises UserError if two experts have one name."""
    named = [(spec.name, str(spec)) for spec in specs]
    for index, (name, text) in enumerate(named):
        for earlier, other in named[:index]:
            if earlier == name:
                raise UserError(f"two experts are called '{name}' ({other} and {text}); name them, e.g. first={other.partition('=')[2]}")


def _from_pipeline(pipe: Any) -> Expert:
    """The expert in a pipeline that is already built, LoRAs and all."""
    components = pipe.components
    component = next((family.component for family in FAMILIES.values() if components.get(family.component) is not None), None)
    if component is None:
        raise UserError(f"a {type(pipe).__name__} has no denoiser that can be an expert")
    return Expert(
        name="",
        model=components[component],
        text_encoders=[components[name] for name in TEXT_ENCODERS if components.get(name) is not None],
        tokenizers=[components[name] for name in TOKENIZERS if components.get(name) is not None],
        scheduler=pipe.scheduler,
        vae=components.get("vae"),
        pipeline=type(pipe).__name__,
        pipeline_options=_options(dict(pipe.config)),
    )


def _from_files(located: Located, dtype: torch.dtype, config: str | None, known: KnownParts) -> Expert:
    spec = located.spec
    if not located.whole_pipeline:
        if spec.loras:
            raise UserError(f"expert '{spec.name}': a LoRA needs a whole pipeline to join, and {located.path} is only a denoiser")
        if located.single_file:
            return _denoiser_file(located, dtype, config)
        said = Prediction(spec.prediction_type)
        return Expert(name=spec.name, model=load_part(located.path, None, dtype), located=located, said=said)
    if located.single_file:
        return _from_single_file(located, dtype, config)
    index = read_index(located.path)
    known = KnownParts() if spec.loras else known  # text encoders that a LoRA changes are shared with nobody
    expert = Expert(
        name=spec.name,
        model=load_part(located.path, component_of(located.path, index), dtype),
        text_encoders=[_load_known(known, located.path, name, dtype) for name in TEXT_ENCODERS if has_part(index, name)],
        tokenizers=[load_part(located.path, name) for name in TOKENIZERS if has_part(index, name)],
        scheduler=folder_scheduler(located, index),
        pipeline=index["_class_name"],
        pipeline_options=_options(index),
        located=located,
    )
    return _fuse_loras(expert)


def _load_known(known: KnownParts, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A component that may have been loaded from equal files before."""
    if not (folder / part / "config.json").is_file():
        return load_part(folder, part, dtype)  # which says what is wrong
    module = known.find(folder / part, dtype)
    if module is None:
        module = load_part(folder, part, dtype)
        known.add(folder / part, dtype, module)
    return module


def _denoiser_file(located: Located, dtype: torch.dtype, config: str | None) -> Expert:
    """A denoiser alone, whatever else its file holds."""
    import diffusers

    _, folder = config_of(located, config)
    index = read_index(folder)
    part = component_of(folder, index)
    maker = getattr(diffusers, index[part][1])
    if located.layout.part == "unet":
        model = read_component(located.path, located.layout, maker, maker.load_config(folder / part, local_files_only=True), dtype)
        said = scheduler_of(located, config, folder)[1]
        return Expert(name=located.spec.name, model=model, located=located, config=config, said=said)
    options = {"config": str(folder), "subfolder": part, "local_files_only": True, "dtype": dtype}
    try:
        model = maker.from_single_file(str(located.path), **options).eval()
    except Exception as error:
        raise UserError(f"{located.path} could not be read with the config {folder.name}: {first_line(error)}") from error
    _check_whole(located, folder, {part: model})
    return Expert(name=located.spec.name, model=model, located=located, config=config, said=flow_only(located))


def _check_whole(located: Located, folder: Path, parts: dict[str, Any]) -> None:
    """Raises UserError for modules whose weights a single file did not hold."""
    for name, part in parts.items():
        if isinstance(part, nn.Module) and any(parameter.is_meta for parameter in part.parameters()):
            missing = next(key for key, parameter in part.named_parameters() if parameter.is_meta)
            raise UserError(f"{located.path} lacks weights of its {name} (first: {missing}); it is no complete checkpoint of config {folder.name}")


def _from_single_file(located: Located, dtype: torch.dtype, config: str | None) -> Expert:
    """The expert in a checkpoint of original layout, through a stock pipeline without its VAE, which is read later."""
    import diffusers

    _, folder = config_of(located, config)
    maker = getattr(diffusers, read_index(folder)["_class_name"])
    options = {"config": str(folder), "local_files_only": True, "dtype": dtype, "vae": None, **load_tokenizers(folder)}
    try:
        pipe = maker.from_single_file(str(located.path), **options)
    except Exception as error:  # the library raises anything for what it did not expect
        raise UserError(f"{located.path} could not be read with the config {folder.name}: {first_line(error)}") from error
    _check_whole(located, folder, pipe.components)
    expert = _from_pipeline(pipe)
    expert.name, expert.located, expert.config = located.spec.name, located, config
    expert.scheduler, expert.said = scheduler_of(located, config, folder)
    return _fuse_loras(expert)


def _fuse_loras(expert: Expert) -> Expert:
    """Add the LoRA files that an expert was given with to its weights."""
    assert expert.located is not None
    if expert.located.spec.loras:
        add_own(expert, expert.located.spec.loras)
        for module in (expert.model, *expert.text_encoders):
            fuse(module)
    return expert


def load_vae(located: Located, config: str | None, dtype: torch.dtype, like: Expert | None = None) -> nn.Module:
    """The VAE of a folder (a whole pipeline, or a VAE alone) or of a single file. Raises UserError as load_expert does.

    like: an expert that it is to serve, whose VAE's settings a VAE alone in a file gets.
    """
    from diffusers import AutoencoderKL

    vae: nn.Module
    if located.single_file and located.layout.part != "pipeline":
        vae = read_vae(located.path, like, config, dtype)
    elif located.single_file:
        _, folder = config_of(located, config)
        options = {"config": str(folder), "subfolder": "vae", "local_files_only": True, "dtype": dtype}
        try:
            vae = AutoencoderKL.from_single_file(str(located.path), **options).eval()
        except Exception as error:
            raise UserError(f"{located.path} has no VAE that could be read; choose another with vae= ({first_line(error)})") from error
        _check_whole(located, folder, {"vae": vae})
    else:
        vae = load_part(located.path, "vae" if located.whole_pipeline else None, dtype)
    check_finite(vae, f"the VAE of {located.path}")
    return vae


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline was configured with besides its components."""
    return {name: config[name] for name in ("force_zeros_for_empty_prompt",) if name in config}
