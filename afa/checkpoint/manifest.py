"""afa.json: what an ensemble is, so that it can be found, checked and made again."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.locate import Located
from afa.experts.original import KNOWN_CONFIGS
from afa.experts.spec import ExpertSpec, Lora
from afa.files import settled

FORMAT = 1
MANIFEST = "afa.json"
AGGREGATORS = "aggregators.safetensors"


@dataclass
class ExpertEntry:
    """One expert of a manifest.

    source: a hub id, or a path relative to the manifest. commit: the hub's full hash. config: of a single file.
    files: sha256 of every file that decides what the expert computes; loras: path and strength.
    """

    name: str
    source: str
    commit: str | None = None
    config: str | None = None
    loras: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    prediction_type: str | None = None

    def spec(self, folder: Path) -> ExpertSpec:
        """How to find this expert again, from the ensemble's folder."""
        path = folder / self.source
        source = str(path) if self.commit is None or path.exists() else self.source
        loras = tuple(Lora(str(folder / lora["path"]), lora["strength"]) for lora in self.loras)
        return ExpertSpec(self.name, source, self.commit, loras)


@dataclass
class Manifest:
    """What is written to afa.json.

    frame: which VAE, tokenizer and scheduler serve the ensemble: an expert's name or a path; and the frame that lends experts their
    text encoders, if it is none of them. placement: a name or a list.
    aggregator: kind, options, attention_up_to, text_stream, parameters, sha256 of the file. training: the recipe and what it measured.
    """

    family: str
    experts: list[ExpertEntry]
    frame: dict[str, str]
    placement: str | list[str]
    stages: list[dict[str, Any]]
    aggregator: dict[str, Any]
    training: dict[str, Any] | None = None
    afa_version: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read an ensemble's manifest. Raises UserError if there is none, or none that this version understands."""
    path = settled(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no ensemble: it has no {MANIFEST}")
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise UserError(f"{path} has format {data['format']}, this afa reads {FORMAT}; use the afa that wrote it ({data.get('afa_version')})")
        unknown = set(data) - {entry.name for entry in fields(Manifest)}
        if unknown:
            raise UserError(f"{path} has entries this afa does not know: {', '.join(sorted(unknown))}")
        return Manifest(**{**data, "experts": [ExpertEntry(**expert) for expert in data["experts"]]})
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as an ensemble's manifest: {error}") from None


def entry_for(located: Located, folder: Path, files: dict[str, str], config: str | None, prediction_type: str | None) -> ExpertEntry:
    """The entry of an expert at the place it is."""
    spec = located.spec
    hub = located.commit is not None
    loras = [{"path": relative(Path(lora.path), folder), "strength": lora.strength} for lora in spec.loras]
    return ExpertEntry(
        name=spec.name,
        source=spec.source if hub else relative(located.path, folder),
        commit=located.commit,
        config=config if config is None or config in KNOWN_CONFIGS else relative(Path(config), folder),
        loras=loras,
        files=files,
        prediction_type=prediction_type,
    )


def relative(path: Path, folder: Path) -> str:
    """A path as it is written from a folder."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def check_hashes(entry: ExpertEntry, located: Located) -> None:
    """Raises UserError, naming the file and both hashes, if an expert is not the one the ensemble was made with."""
    from afa.experts.hashing import hash_expert

    found = hash_expert(located)
    for name, expected in entry.files.items():
        if name not in found:
            raise UserError(f"expert '{entry.name}': {located.path} has no {name}, which the ensemble was made with (sha256 {expected})")
        if found[name] != expected:
            raise UserError(
                f"expert '{entry.name}' has changed: {name} in {located.path} has sha256 {found[name]}, the ensemble was made with {expected};"
                " restore the file or train again"
            )
