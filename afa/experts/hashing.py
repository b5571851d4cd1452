"""What an expert is made of, as hashes: so that an ensemble can say that one of its experts has changed."""

from pathlib import Path

from afa.experts.locate import Located
from afa.files import sha256

WEIGHTS = (".safetensors", ".bin")
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # what an ensemble computes with


def expert_files(located: Located) -> dict[str, Path]:
    """The files whose content decides what an expert computes, by the name they have in a manifest."""
    if located.single_file:
        files = {located.path.name: located.path}
    elif located.whole_pipeline:
        files = _weights(located.path, [located.path / part for part in PARTS])
    else:
        files = _weights(located.path, [located.path])
    return files | {f"lora {index}": Path(lora.path) for index, lora in enumerate(located.spec.loras)}


def _weights(root: Path, folders: list[Path]) -> dict[str, Path]:
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS]
    return {path.relative_to(root).as_posix(): path for path in found}


def hash_expert(located: Located) -> dict[str, str]:
    """sha256 of each of an expert's files."""
    return {name: sha256(path) for name, path in expert_files(located).items()}
