"""Where an expert comes from: its spec, its files, their hashes."""

import os
import re
import stat
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from afa.errors import UserError, unknown
from afa.experts.folders import weight_files
from afa.experts.headers import read_header
from afa.experts.layouts import Layout, layout_of
from afa.experts.parts import has_part, read_index
from afa.files import given_name, settled, sha256
from afa.places import check_name, located, plain_name
from afa.settings import check_number

PREDICTION_TYPES = ("epsilon", "v_prediction")  # what a U-Net may predict
PREDICTION_HELP = "what U-Nets of single files predict, where the files do not say it themselves"  # of --prediction-type
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(/[\w./-]+\.safetensors)?")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Lora:
    """A LoRA file that becomes part of an expert, and how strongly (1 = as trained)."""

    path: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.strength, f"the strength of LoRA {self.path} is", least=-1000, most=1000)

    def __str__(self) -> str:
        return self.path if self.strength == 1 else f"{self.path}*{self.strength:g}"


@dataclass(frozen=True)
class ExpertSpec:
    """One expert as asked for.

    source: a diffusers folder, a .safetensors file, a hub id org/name, or org/name/file.safetensors.
    revision: branch, tag or commit of a hub id.
    named_by: the file that names it, where the user did not.
    prediction_type: one of PREDICTION_TYPES, where its user says it beside the text.
    """

    name: str
    source: str
    revision: str | None = None
    loras: tuple[Lora, ...] = field(default=())
    named_by: str | None = None
    prediction_type: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.name}={self.source}{revision}{''.join(f'+{lora}' for lora in self.loras)}"

    @classmethod
    def parse(cls, text: str, prediction_type: str | None = None) -> "ExpertSpec":
        """Read "name=source@revision+lora*strength". Raises UserError if the parts make no sense.

        prediction_type: what it predicts, for a file that does not say it. demo:MODEL is an
        embedded source. A path that exists as it stands is taken whole, whatever characters are in it.
        """
        text = located(text)
        name, rest = None, text
        head, equals, tail = text.partition("=")
        named = NAME.fullmatch(head) or exists(tail) or HUB_ID.fullmatch(tail)
        if equals and named and not exists(text):
            name, rest = check_name(head, "an expert"), tail
        pieces = _pieces(rest)
        source, loras = pieces[0], tuple(_lora(piece) for piece in pieces[1:])
        revision = None
        if "@" in source and not exists(source):
            source, _, revision = source.rpartition("@")
        if not source:
            raise UserError(f"expert '{text}' has no source; write a folder, a .safetensors file or org/name, optionally as name=source")
        if prediction_type not in (None, *PREDICTION_TYPES):
            raise UserError(unknown(str(prediction_type), PREDICTION_TYPES, "prediction type"))
        return cls(name or _default_name(source), source, revision, loras, prediction_type=prediction_type)


def exists(place: str) -> bool:
    """Whether there is something of that name; a text that can be no path names nothing."""
    try:
        return Path(place).exists()
    except (OSError, ValueError):
        return False


def new_places(given: list[str]) -> dict[str, str]:
    """Where the experts of a saved ensemble are now: NAME=PLACE, split. Raises UserError where there is no name."""
    for place in given:
        if "=" not in place:
            raise UserError(f"--experts {place} names no expert; write NAME={place}")
    return dict(place.split("=", 1) for place in given)


def _pieces(text: str) -> list[str]:
    """The source and the LoRAs behind it. A + divides them, unless it belongs to the name of something that exists."""
    parts, pieces = text.split("+"), []
    while parts:
        ends = range(len(parts), 0, -1)
        joined = ("+".join(parts[:end]) for end in ends)
        there = (exists(piece) or exists(re.sub(r"\*[^*+]*$", "", piece)) for piece in joined)
        end = next((end for end, found in zip(ends, there, strict=True) if found), 1)
        pieces.append("+".join(parts[:end]))
        parts = parts[end:]
    return pieces


def _lora(text: str) -> Lora:
    path, star, strength = text.rpartition("*")
    if not star or exists(text):
        return Lora(text)
    try:
        number = float(strength)
    except ValueError:
        raise UserError(f"the strength '{strength}' of LoRA {path} is no number; write e.g. +{path}*0.8") from None
    return Lora(path, number)


def _default_name(source: str) -> str:
    """The folder's or file's name as it was given, without .safetensors and what cannot be in a name."""
    return plain_name(given_name(Path(source)).removesuffix(".safetensors"), "expert")


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
        return self.layout.part == "pipeline" if self.single_file else (self.path / "model_index.json").is_file()

    @cached_property
    def layout(self) -> Layout:
        """How a single file names its tensors. Raises UserError if it is broken, or is not read at all."""
        return layout_of(read_header(self.path), self.path)


def locate(spec: ExpertSpec) -> Located:
    """Find an expert's files; a hub id is downloaded once. Raises UserError if there is nothing by that name.

    What exists here is never taken for a hub id, and a mistyped path is not looked for on the network.
    """
    for lora in spec.loras:
        if not exists(lora.path):
            raise UserError(f"expert '{spec.name}': there is no LoRA file {lora.path}")
        _check_plain(Path(lora.path))
        if Path(lora.path).suffix != ".safetensors":
            raise UserError(f"expert '{spec.name}': the LoRA {lora.path} is no .safetensors file; convert pickles first")
    path, there = Path(spec.source), exists(spec.source)
    if there and path.is_dir():
        settled(path)  # a merge that was killed at its end
        if (path / "afa.json").is_file():
            raise UserError(f"{path} is a saved ensemble, which has its experts; give it alone, or give experts only")
        if not (path / "model_index.json").is_file() and not (path / "config.json").is_file():
            raise UserError(f"{path} is no diffusers folder: it has neither model_index.json nor config.json")
        for file in (*path.iterdir(), *path.glob("*/*")):
            _check_plain(file)
        return Located(spec, path)
    if there:
        _check_plain(path)
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is a '{path.suffix}' file; experts are diffusers folders or .safetensors files (convert pickles first)")
        return Located(spec, path)
    from_file = spec.named_by is not None and spec.revision is None  # what a file names without a commit is a path
    if from_file or not HUB_ID.fullmatch(spec.source) or ".." in spec.source.split("/"):
        raise UserError(f"there is no folder or file {spec.source}")
    return _from_hub(spec)


def _check_plain(path: Path) -> None:
    """Raises UserError for a pipe, a socket or a device, which could be read without end; links to them, too."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # a link to nothing: its reader says so
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or path.resolve().parts[1:2] in (("dev",), ("proc",), ("sys",)):
        raise UserError(f"{path} is no plain file or folder; experts are diffusers folders or .safetensors files")


@cache
def _tell(spec: ExpertSpec) -> None:
    """Say once which hub id is fetched that the user did not type."""
    at = f" at commit {spec.revision}" if spec.revision else ""
    print(f"afa: {spec.named_by} names expert '{spec.name}' as {spec.source} of the hub{at}: fetched, unless it is here already", file=sys.stderr)


def _from_hub(spec: ExpertSpec) -> Located:
    """Download a repository (or one file of it) into the hub's cache, or find it there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if spec.named_by is not None:
        _tell(spec)
    parts = spec.source.split("/")
    try:
        if len(parts) > 2:
            file = hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=spec.revision)
            return Located(spec, Path(file), commit=_commit(Path(file)))
        index = Path(hf_hub_download(spec.source, "model_index.json", revision=spec.revision))
        read_index(index.parent)  # refuses classes that are not the libraries' own, before a library is asked
        folder = _download(spec)
        return Located(spec, folder, commit=_commit(folder))
    except UserError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "ON", "YES") else ""
        revision = f" at revision {spec.revision}" if spec.revision else ""
        raise UserError(
            f"'{spec.source}' is neither a folder nor a file here, and as a hub id it could not be loaded{revision}{offline}: {_reason(error)}"
        ) from error


def _download(spec: ExpertSpec) -> Path:
    """A pipeline's repository, as far as experts need it; in half precision where it has no other weights."""
    from diffusers import DiffusionPipeline

    options = {"revision": spec.revision, "use_safetensors": True, "safety_checker": None, "feature_extractor": None}
    try:
        return Path(DiffusionPipeline.download(spec.source, **options))
    except OSError as error:
        if "safetensors" not in str(error):  # which are missing without a variant
            raise
        return Path(DiffusionPipeline.download(spec.source, variant="fp16", **options))


def _commit(path: Path) -> str | None:
    """The commit in a path of the hub's cache: …/snapshots/COMMIT/…"""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _reason(error: Exception) -> str:
    """What went wrong: the library's first sentence, without its advice and what it adds in brackets."""
    return str(error).strip().partition("\n")[0].partition(" (")[0].partition(". ")[0]


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
