"""What a diffusers folder is made of, and one component of it, by the class it names.

Classes are the installed libraries' own, each of the kind that its place asks for, and are checked before a
library is asked to load anything: a folder that was downloaded never chooses what code runs.
"""

import functools
from pathlib import Path
from typing import Any

from torch import nn

from afa.errors import UserError
from afa.experts.folders import read_config, read_object
from afa.models.registry import FAMILIES

INDEX = "model_index.json"
# What a component must be: library, base class, what a class of that kind can do that a base class cannot.
DENOISER = ("diffusers", "ModelMixin", "forward")
KINDS = {
    **{family.component: DENOISER for family in FAMILIES.values()},
    "vae": ("diffusers", "ModelMixin", "encode"),
    "scheduler": ("diffusers", "SchedulerMixin", "step"),
    **dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3"), ("transformers", "PreTrainedModel", "forward")
    ),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_2", "tokenizer_3"), ("transformers", "PreTrainedTokenizerBase", "__call__")
    ),
}
LIBRARIES = (
    "diffusers",
    "transformers",
    "stable_diffusion",
)  # of components that are never loaded, such as the safety checker


def load_part(folder: Path, part: str) -> Any:
    """A tokenizer or the scheduler of a pipeline's folder, of the class that its index names.

    part: its name in model_index.json
    Raises UserError if there is none, or it cannot be loaded.
    """
    index = read_index(folder)
    if not has_part(index, part):
        raise UserError(f"{folder} has no {part} ({INDEX} names none)")
    kind = component_class(folder / part, part, *index[part])
    _check_settings(folder / part)
    return from_pretrained(kind, folder, folder / part, subfolder=part)


def from_pretrained(maker: Any, folder: Path, place: Path, **options: Any) -> Any:
    """What a library loads from a folder.

    place: the component's own, for messages. Raises UserError for what it cannot load.
    """
    try:
        return maker.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the libraries raise anything for settings of a wrong type
        raise UserError(f"{place} could not be loaded as {maker.__name__}: {first_line(error)}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that no pipeline describes, of whichever class of transformers it names."""
    from transformers import AutoTokenizer

    _check_settings(folder)
    return from_pretrained(AutoTokenizer, folder, folder, trust_remote_code=False)


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a folder that no pipeline describes."""
    name = str(read_config(folder, "scheduler_config.json").get("_class_name"))
    return from_pretrained(component_class(folder, "scheduler", "diffusers", name), folder, folder)


def _check_settings(folder: Path) -> None:
    """Raise UserError for settings of a scheduler or tokenizer that are broken, or that name custom code."""
    for name in ("scheduler_config.json", "tokenizer_config.json", "config.json"):
        if (folder / name).exists():
            read_config(folder, name)


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline folder is made of.

    Raises UserError if that cannot be read, or names a class that is not the installed libraries' own.
    """
    file = folder / INDEX
    index = read_object(file)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in _pipelines():
        known = (
            "is not known to the installed diffusers"
            if isinstance(name, str)
            else "expected a name such as StableDiffusionPipeline"
        )
        raise UserError(
            f"{file}: the pipeline's _class_name is {name!r:.80}, {known}; "
            "correct it or download the folder again"
        )
    for part, entry in index.items():
        if part in KINDS and entry is not None and not isinstance(entry, list):
            raise UserError(
                f"{file}: {part} is {entry!r:.80}, expected a library and a class; download the folder again"
            )
        if not isinstance(entry, list) or not (
            part in KINDS or any(isinstance(value, str) for value in entry)
        ):
            continue
        if entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(value, str) for value in entry):
            raise UserError(
                f"{file}: {part} is {entry!r:.80}, expected a library and a class; download the folder again"
            )
        component_class(file, part, *entry)
    return index


@functools.cache
def _pipelines() -> frozenset[str]:
    """The pipelines of the installed diffusers, by name; none is imported."""
    import diffusers

    others = ("DiffusionPipeline", "ModularPipeline")  # what all are made of
    ends = ("Output", "Blocks", "Config")
    names = (name for name in dir(diffusers) if "Pipeline" in name and not name.startswith("Auto"))
    return frozenset(name for name in names if name not in others and not name.endswith(ends))


def component_class(where: Path, part: str | None, library: str, name: str) -> Any:
    """The class of a component.

    where: what names it, for messages. part: its place in a pipeline; None for a denoiser's own folder.
    Raises UserError if it is not the installed library's own, or of another kind. None for parts that are
    never loaded.
    """
    if part is not None and part not in KINDS:
        if library not in LIBRARIES or not name.isidentifier():
            raise UserError(_foreign(where, part, library, name))
        return None
    home, base, ability = KINDS[part] if part else DENOISER
    maker = _class(home, base, ability, name) if library == home else None
    if maker is None:
        raise UserError(_foreign(where, part or "denoiser", library, name))
    return maker


def _foreign(where: Path, part: str, library: str, name: str) -> str:
    known = f"which is no {part.rstrip('_23')} known to the installed libraries"
    return (
        f"{where}: its {part} is the class {library}.{name}"[:300]
        + f", {known}; code that comes with a model is never run"
    )


@functools.cache
def _class(library: str, base: str, ability: str, name: str) -> Any:
    """A class of a library, or None if there is none of that name, or of another kind."""
    import diffusers
    import transformers

    module = {"diffusers": diffusers, "transformers": transformers}[library]
    try:
        found = getattr(module, name, None)
    except Exception:  # what lacks a package that is not installed
        return None
    parent = getattr(module, base)
    if not isinstance(found, type) or not issubclass(found, parent) or found is parent:
        return None
    able = getattr(found, ability, None)
    return found if able is not None and able is not getattr(nn.Module, ability, None) else None


def check_config(place: Path, library: str, name: str) -> dict[str, Any]:
    """A component's settings. Raises UserError where they are those of another class of diffusers."""
    config = read_config(place)
    own = config.get("_class_name")
    if library == "diffusers" and own is not None and own != name:
        raise UserError(
            f"{place / 'config.json'} is of a {own}, {INDEX} says {name}; download the folder again"
        )
    return config


def component_of(folder: Path, index: dict[str, Any]) -> str:
    """The name of the denoiser in a pipeline's folder.

    Raises UserError if it has none that can be an expert.
    """
    for family in FAMILIES.values():
        if has_part(index, family.component):
            component_named(folder, index[family.component][1])
            return family.component
    raise UserError(f"{folder} is a {index.get('_class_name')}, which has no denoiser that can be an expert")


def component_named(folder: Path, class_name: str) -> str:
    """What pipelines call a denoiser of a class. Raises UserError if no family reads that class."""
    components = {family.model: family.component for family in FAMILIES.values()}
    if class_name not in components:
        raise UserError(
            f"{folder}: a {class_name} cannot be an expert; supported are: {', '.join(components)}"
        )
    return components[class_name]


def has_part(index: dict[str, Any], name: str) -> bool:
    """Whether a pipeline has a component of that name."""
    entry = index.get(name)
    return isinstance(entry, list) and entry[0] is not None


def first_line(error: Exception) -> str:
    """What went wrong, without what a library says below it."""
    return str(error).strip().partition("\n")[0]
