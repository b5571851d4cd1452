"""The files of an expert: where they are, here or on the hub, and their hashes."""

import os
import stat
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from afa.errors import UserError
from afa.experts.folders import weight_files
from afa.experts.gguf_files import SUFFIX
from afa.experts.headers import read_file
from afa.experts.layouts import Layout, layout_of
from afa.experts.parts import has_part, read_index
from afa.experts.spec import (
    HUB_ID,
    ExpertSpec,
    exists,
)
from afa.files import settled, sha256
from afa.hub_files import hub_file

SUFFIXES = (".safetensors", SUFFIX)  # of single files


@dataclass(frozen=True)
class Located:
    """The files of an expert.

    spec:   what the user asked for
    path:   a diffusers folder, or a .safetensors or .gguf file
    commit: on the hub; None: not from the hub
    """

    spec: ExpertSpec
    path: Path
    commit: str | None = None

    @property
    def single_file(self) -> bool:
        """Whether it is one file, not a folder."""
        return self.path.is_file()

    @property
    def whole_pipeline(self) -> bool:
        """Whether it has text encoders and a scheduler, not only the denoiser."""
        return (
            self.layout.part == "pipeline" if self.single_file else (self.path / "model_index.json").is_file()
        )

    @cached_property
    def layout(self) -> Layout:
        """How a single file names its tensors. Raises UserError for a broken file, or a model not read."""
        return layout_of(read_file(self.path), self.path)


def locate(spec: ExpertSpec) -> Located:
    """Find an expert's files. A hub id is downloaded once.

    What exists here is never taken for a hub id, and a mistyped path is not looked for on the network.
    Raises UserError if nothing has that name, or it is no model.
    """
    check_loras(spec)
    path, there = Path(spec.source), exists(spec.source)
    if there and path.is_dir():
        settled(path)  # finishes a merge that was killed while its files were moved into place
        if (path / "afa.json").is_file():
            raise UserError(
                f"{path} is a saved ensemble, which has its experts; give it alone, or give experts only"
            )
        if not (path / "model_index.json").is_file() and not (path / "config.json").is_file():
            raise UserError(f"{path} is no diffusers folder: it has neither model_index.json nor config.json")
        for file in (*path.iterdir(), *path.glob("*/*")):
            _check_plain(file)
        return Located(spec, path)
    if there:
        _check_plain(path)
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"{path} is a '{path.suffix}' file; experts are diffusers folders, "
                ".safetensors or .gguf files (convert pickles first)"
            )
        return Located(spec, path)
    from_manifest = spec.named_by is not None and spec.revision is None  # without a commit it is a path
    if from_manifest or not HUB_ID.fullmatch(spec.source) or ".." in spec.source.split("/"):
        raise UserError(f"there is no folder or file {spec.source}")
    return _from_hub(spec)


# what is downloaded of a frame: configs and tokenizers
FRAME_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")


def locate_frame(frame: str) -> Located:
    """Find a frame: a pipeline's folder, or a hub id (org/name@revision) of which no weights are downloaded.

    Raises UserError if nothing has that name, or it is no pipeline's folder.
    """
    if exists(frame):
        folder = Path(frame)
        if not (folder / "model_index.json").is_file():
            raise UserError(f"frame '{frame}' is no pipeline's folder: it has no model_index.json")
        settled(folder)
        return Located(ExpertSpec(frame, frame), folder)
    source, _, revision = frame.partition("@")
    if source.count("/") != 1 or not HUB_ID.fullmatch(source) or ".." in frame:
        raise UserError(f"frame '{frame}' is no pipeline's folder here, and no hub id such as org/name")
    spec = ExpertSpec(frame, source, revision or None)

    def download() -> Path:
        from huggingface_hub import snapshot_download

        index = hub_file(source, "model_index.json", spec.revision)
        read_index(index.parent)  # refuses foreign classes before anything else is fetched
        return Path(snapshot_download(source, revision=_commit(index), allow_patterns=list(FRAME_FILES)))

    folder = _fetched(spec, download)
    return Located(spec, folder, commit=_commit(folder))


def check_loras(spec: ExpertSpec) -> None:
    """Raise UserError for a LoRA file of an expert that is missing, or no .safetensors file."""
    for lora in spec.loras:
        if not exists(lora.path):
            raise UserError(f"expert '{spec.name}': there is no LoRA file {lora.path}")
        _check_plain(Path(lora.path))
        if Path(lora.path).suffix != ".safetensors":
            raise UserError(
                f"expert '{spec.name}': the LoRA {lora.path} is no .safetensors file; convert pickles first"
            )


def _check_plain(path: Path) -> None:
    """Raise UserError for a pipe, a socket or a device, or a link to one: reading it might never end."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # a link to nothing: its reader names it
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or path.resolve().parts[1:2] in (
        ("dev",),
        ("proc",),
        ("sys",),
    ):
        raise UserError(
            f"{path} is no plain file or folder; experts are diffusers folders or .safetensors files"
        )


@cache
def _announce(spec: ExpertSpec) -> None:
    """Print once that a hub id is fetched which a file names, not the user."""
    at = f" at commit {spec.revision}" if spec.revision else ""
    print(
        f"afa: {spec.named_by} names expert '{spec.name}' as {spec.source} of the hub{at}: fetched, "
        "unless it is here already",
        file=sys.stderr,
    )


def _from_hub(spec: ExpertSpec) -> Located:
    """Download a repository (or one file of it) into the hub's cache, or find it there."""
    if spec.named_by is not None:
        _announce(spec)
    parts = spec.source.split("/")

    def download() -> Path:
        if len(parts) > 2:
            return hub_file("/".join(parts[:2]), "/".join(parts[2:]), spec.revision)
        index = hub_file(spec.source, "model_index.json", spec.revision)
        read_index(index.parent)  # refuses foreign classes before a library sees them
        return _download(spec)

    path = _fetched(spec, download)
    return Located(spec, path, commit=_commit(path))


def _fetched(spec: ExpertSpec, download: Callable[[], Path]) -> Path:
    """What a download returns. Raises UserError where the hub, the network or the cache does not give it."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return download()
    except UserError:
        raise
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        offline = (
            " (HF_HUB_OFFLINE is set)"
            if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "ON", "YES")
            else ""
        )
        revision = f" at revision {spec.revision}" if spec.revision else ""
        reason = _reason(error)
        if isinstance(error, HTTPError) and not isinstance(error, OSError):  # no answer, be it a refusal
            reason = f"the hub does not answer ({reason}); check the network"
        raise UserError(
            f"'{spec.source}' is neither a folder nor a file here, "
            f"and as a hub id it could not be loaded{revision}{offline}: {reason}"
        ) from error


def _download(spec: ExpertSpec) -> Path:
    """Download what experts need of a pipeline's repository; weights in float16 if there are no others."""
    from diffusers import DiffusionPipeline

    options = {
        "revision": spec.revision,
        "use_safetensors": True,
        "safety_checker": None,
        "feature_extractor": None,
    }
    try:
        return Path(DiffusionPipeline.download(spec.source, **options))
    except OSError as error:
        if "safetensors" not in str(error):  # otherwise there are none without a variant
            raise
        return Path(DiffusionPipeline.download(spec.source, variant="fp16", **options))


def _commit(path: Path) -> str | None:
    """The commit in a path of the hub's cache, …/snapshots/COMMIT/…; None if there is none."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _reason(error: Exception) -> str:
    """The first sentence of a library's message, without its advice and what stands in brackets."""
    return str(error).strip().partition("\n")[0].partition(" (")[0].partition(". ")[0]


# components whose files decide what an expert computes
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def expert_files(located: Located) -> dict[str, Path]:
    """The weight files that decide what an expert computes: name in a manifest -> file."""
    root = located.path
    if located.single_file:
        files = {root.name: root}
    else:
        found = [path for folder in _folders(located) for path in weight_files(folder).files]
        files = {path.relative_to(root).as_posix(): path for path in found}
    return files | {f"lora {index}": Path(lora.path) for index, lora in enumerate(located.spec.loras)}


def _folders(located: Located) -> list[Path]:
    """The folders with those weight files: of its components, or of a denoiser alone."""
    if not located.whole_pipeline:
        return [located.path]
    index = read_index(located.path)
    return [located.path / part for part in PARTS if has_part(index, part)]


def hash_expert(located: Located) -> dict[str, str]:
    """sha256 of each of an expert's files, by its name in a manifest."""
    return {name: sha256(path) for name, path in expert_files(located).items()}


def recorded_files(located: Located, names: Collection[str]) -> dict[str, Path]:
    """The files of an expert that are loaded, and those beside them that a manifest names.

    names: of files in the manifest; older versions also recorded weight files that are not loaded
    """
    files = expert_files(located)
    own = [name for name in names if not name.startswith("lora ")]
    if located.single_file and len(own) == 1:  # a file may have another name by now
        files[own[0]] = files.pop(located.path.name)
    folders = [] if located.single_file else _folders(located)
    beside = {
        path.relative_to(located.path).as_posix(): path for folder in folders for path in folder.iterdir()
    }
    return files | {name: beside[name] for name in names if name not in files and name in beside}
