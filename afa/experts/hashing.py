"""What an expert is made of, as hashes: so that an ensemble can say that one of its experts has changed."""

from collections.abc import Collection
from pathlib import Path

from afa.experts.folders import weight_files
from afa.experts.locate import Located
from afa.experts.parts import has_part, read_index
from afa.files import sha256

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # what an ensemble computes with


def expert_files(located: Located) -> dict[str, Path]:
    """The weight files that decide what an expert computes, as they are loaded, by the name they have in a manifest."""
    root = located.path
    if located.single_file:
        files = {root.name: root}
    else:
        found = [path for folder in _folders(located) for path in weight_files(folder).files]
        files = {path.relative_to(root).as_posix(): path for path in found}
    return files | {f"lora {index}": Path(lora.path) for index, lora in enumerate(located.spec.loras)}


def _folders(located: Located) -> list[Path]:
    """The folders of what an ensemble computes with: its parts, or a denoiser's own."""
    if not located.whole_pipeline:
        return [located.path]
    index = read_index(located.path)
    return [located.path / part for part in PARTS if has_part(index, part)]


def hash_expert(located: Located) -> dict[str, str]:
    """sha256 of each of an expert's files."""
    return {name: sha256(path) for name, path in expert_files(located).items()}


def recorded_files(located: Located, names: Collection[str]) -> dict[str, Path]:
    """The files of an expert that a manifest names: those that are loaded, and others beside them.

    Older manifests also name weight files that lie there without being loaded.
    """
    files = expert_files(located)
    folders = [] if located.single_file else _folders(located)
    beside = {path.relative_to(located.path).as_posix(): path for folder in folders for path in folder.iterdir()}
    return files | {name: beside[name] for name in names if name not in files and name in beside}
