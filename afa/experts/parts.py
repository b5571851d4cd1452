"""The components of a diffusers pipeline's folder, their classes, and its tokenizers and scheduler.

A class must be one of the installed diffusers or transformers, and of the kind that a component needs. This
is checked before a library loads anything, so that a downloaded folder never chooses what code runs.
"""

import functools
from pathlib import Path
from typing import Any

from torch import nn

from afa.errors import UserError
from afa.experts.folders import read_config, read_object
from afa.models.registry import FAMILIES

INDEX = "model_index.json"
PROCESSOR = "processor"  # of text and images, in pipelines without a tokenizer; only its tokenizer is read
# The kind of class that a component needs: its library, base classes that serve, a method of it.
DENOISER = ("diffusers", ("ModelMixin",), "forward")
KINDS = {
    **{family.component: DENOISER for family in FAMILIES.values()},
    "vae": ("diffusers", ("ModelMixin",), "encode"),
    "scheduler": ("diffusers", ("SchedulerMixin",), "step"),
    **dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3"),
        ("transformers", ("PreTrainedModel",), "forward"),
    ),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_2", "tokenizer_3"),
        # FLUX.2-dev has a processor of text and images
        ("transformers", ("PreTrainedTokenizerBase", "ProcessorMixin"), "__call__"),
    ),
}
# libraries of components that are never loaded, such as the safety checker
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


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
    return from_pretrained(kind, folder / part)


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Let a library load a tokenizer or a scheduler from its folder. Raises UserError where it cannot."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the libraries raise anything for settings of a wrong type
        raise UserError(f"{folder} could not be loaded as {kind.__name__}: {first_line(error)}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that belongs to no pipeline, of the class of transformers that it names."""
    from transformers import AutoTokenizer

    _check_settings(folder)
    return from_pretrained(AutoTokenizer, folder, trust_remote_code=False)


def load_tokenizers_of(folder: Path, index: dict[str, Any]) -> list[Any]:
    """The tokenizers of a pipeline's folder, or that of its processor. index: see read_index"""
    names = [name for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if has_part(index, name)]
    if not names and has_part(index, PROCESSOR):
        return [load_tokenizer(folder / PROCESSOR)]
    return [load_part(folder, name) for name in names]


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a folder that belongs to no pipeline. Raises UserError if there is none."""
    name = str(read_config(folder, "scheduler_config.json").get("_class_name"))
    return from_pretrained(component_class(folder, "scheduler", "diffusers", name), folder)


def _check_settings(folder: Path) -> None:
    """Raise UserError for settings of a scheduler or tokenizer that are broken, or name custom code."""
    for name in ("scheduler_config.json", "tokenizer_config.json", "config.json"):
        if (folder / name).exists():
            read_config(folder, name)


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a pipeline's model_index.json: component -> [library, class].

    Raises UserError if it cannot be read, or names a class that the installed libraries do not have.
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
    """The names of the installed diffusers' pipelines. No pipeline is imported."""
    import diffusers

    others = ("DiffusionPipeline", "ModularPipeline")  # base classes
    ends = ("Output", "Blocks", "Config")
    names = (name for name in dir(diffusers) if "Pipeline" in name and not name.startswith("Auto"))
    return frozenset(name for name in names if name not in others and not name.endswith(ends))


def component_class(where: Path, part: str | None, library: str, name: str) -> Any:
    """The class of a component.

    where:   the file or folder that names it, for messages
    part:    its name in a pipeline; None: a denoiser alone
    library: diffusers or transformers
    name:    of the class
    Returns the class; None for a component that is never loaded.
    Raises UserError for a class that the installed library does not have, or of another kind.
    """
    if part is not None and part not in KINDS:
        if library not in LIBRARIES or not name.isidentifier():
            raise UserError(_foreign(where, part, library, name))
        return None
    home, bases, ability = KINDS[part] if part else DENOISER
    kind = _class(home, bases, ability, name) if library == home else None
    if kind is None:
        raise UserError(_foreign(where, part or "denoiser", library, name))
    return kind


def _foreign(where: Path, part: str, library: str, name: str) -> str:
    known = f"which is no {part.rstrip('_23')} known to the installed libraries"
    return (
        f"{where}: its {part} is the class {library}.{name}"[:300]
        + f", {known}; code that comes with a model is never run"
    )


@functools.cache
def _class(library: str, bases: tuple[str, ...], ability: str, name: str) -> Any:
    """A class of a library; None if there is none of that name, or it is of another kind."""
    import diffusers
    import transformers

    module = {"diffusers": diffusers, "transformers": transformers}[library]
    try:
        found = getattr(module, name, None)
    except Exception:  # a class that needs a package which is not installed
        return None
    parents = tuple(getattr(module, base) for base in bases)
    if isinstance(found, type) and hasattr(found, "_backends") and "ProcessorMixin" in bases:
        return found  # transformers' stand-in for a class whose packages are missing: loading it names them
    if not isinstance(found, type) or not issubclass(found, parents) or found in parents:
        return None
    able = getattr(found, ability, None)
    return found if able is not None and able is not getattr(nn.Module, ability, None) else None


def check_config(place: Path, library: str, name: str) -> dict[str, Any]:
    """The settings of a component. Raises UserError if they belong to another class of diffusers."""
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
    """Whether a pipeline has a component. index: the content of its model_index.json."""
    entry = index.get(name)
    return isinstance(entry, list) and entry[0] is not None


def first_line(error: Exception) -> str:
    """The first line of an error's message; libraries add long advice below it."""
    return str(error).strip().partition("\n")[0]
