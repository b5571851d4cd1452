"""What a diffusers folder is made of, and one component of it, by the class it names."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from torch import nn

from afa.errors import UserError
from afa.families.table import FAMILIES

READING = (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError)  # what readers of files raise


def load_part(folder: Path, part: str | None, dtype: torch.dtype | None = None) -> Any:
    """One component of a diffusers folder (or the folder itself, for part None), by the class it names."""
    import diffusers
    import transformers

    if part is None:
        library, name = "diffusers", json.loads((folder / "config.json").read_text()).get("_class_name", "")
    else:
        library, name = read_index(folder)[part]
    maker = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if maker is None:
        raise UserError(f"{folder / (part or '')}: the class {library}.{name} is not known to the installed {library}")
    options: dict[str, Any] = {"subfolder": part} if part else {}
    if dtype is not None:
        options |= {"dtype": dtype}
    network = issubclass(maker, nn.Module)
    try:
        loaded = maker.from_pretrained(folder, local_files_only=True, **options, **({"output_loading_info": True} if network else {}))
    except READING as error:
        raise UserError(f"{folder / (part or '')} could not be loaded as {name}: {first_line(error)}") from error
    if not network:
        return loaded
    model, info = loaded
    if info["missing_keys"]:  # the libraries would leave them empty, or draw them at random
        missing = sorted(info["missing_keys"])
        raise UserError(f"{folder / (part or '')} lacks {len(missing)} of the weights of a {name} (first: {missing[0]}); download or export it again")
    return model.eval()


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline folder is made of. Raises UserError if that cannot be read."""
    try:
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    except READING as error:
        raise UserError(f"{folder / 'model_index.json'} cannot be read: {error}") from None
    return index


def component_of(folder: Path, index: dict[str, Any]) -> str:
    """The name of the denoiser in a pipeline folder. Raises UserError if it has none that can be an expert."""
    for family in FAMILIES.values():
        if has_part(index, family.component):
            return family.component
    raise UserError(f"{folder} is a {index.get('_class_name')}, which has no denoiser that can be an expert")


def has_part(index: dict[str, Any], name: str) -> bool:
    """Whether a pipeline has a component of that name."""
    entry = index.get(name)
    return isinstance(entry, list) and entry[0] is not None


def first_line(error: Exception) -> str:
    """What went wrong, without what a library says below it."""
    return str(error).strip().partition("\n")[0]
