"""From a spec to files on this machine: folders and files as they are, hub ids through the hub's cache."""

import os
from dataclasses import dataclass
from pathlib import Path

from afa.errors import UserError
from afa.experts.original import is_alone
from afa.experts.spec import HUB_ID, ExpertSpec


@dataclass(frozen=True)
class Located:
    """An expert's files: a diffusers folder or one .safetensors file, and the hub's commit it was taken at."""

    spec: ExpertSpec
    path: Path
    commit: str | None = None

    @property
    def single_file(self) -> bool:
        return self.path.is_file()

    @property
    def whole_pipeline(self) -> bool:
        """Whether it brings text encoders, VAE and scheduler, not only the denoiser."""
        return not is_alone(self.path) if self.single_file else (self.path / "model_index.json").is_file()


def locate(spec: ExpertSpec) -> Located:
    """Find an expert's files; a hub id is downloaded once. Raises UserError if there is nothing by that name.

    What exists here is never taken for a hub id, and a mistyped path is not looked for on the network.
    """
    for lora in spec.loras:
        if not Path(lora.path).is_file():
            raise UserError(f"expert '{spec.name}': there is no LoRA file {lora.path}")
    path = Path(spec.source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is a '{path.suffix}' file; experts are diffusers folders or .safetensors files (convert pickles first)")
        return Located(spec, path)
    if path.is_dir():
        if not (path / "model_index.json").is_file() and not (path / "config.json").is_file():
            raise UserError(f"{path} is no diffusers folder: it has neither model_index.json nor config.json")
        return Located(spec, path)
    if not HUB_ID.fullmatch(spec.source):
        raise UserError(f"there is no folder or file {spec.source}")
    return _from_hub(spec)


def _from_hub(spec: ExpertSpec) -> Located:
    """Download a repository (or one file of it) into the hub's cache, or find it there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    parts = spec.source.split("/")
    try:
        if len(parts) > 2:
            file = hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=spec.revision)
            return Located(spec, Path(file), commit=_commit(Path(file)))
        from diffusers import DiffusionPipeline

        folder = DiffusionPipeline.download(spec.source, revision=spec.revision, safety_checker=None, feature_extractor=None)
        return Located(spec, Path(folder), commit=_commit(Path(folder)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "ON", "YES") else ""
        revision = f" at revision {spec.revision}" if spec.revision else ""
        raise UserError(
            f"'{spec.source}' is neither a folder nor a file here, and as a hub id it could not be loaded{revision}{offline}: {_reason(error)}"
        ) from error


def _commit(path: Path) -> str | None:
    """The commit in a path of the hub's cache: …/snapshots/COMMIT/…"""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _reason(error: Exception) -> str:
    """What went wrong, without the library's advice on its own internals in brackets behind it."""
    return str(error).strip().partition("\n")[0].partition(" (")[0]
