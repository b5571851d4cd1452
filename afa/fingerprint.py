"""What a run is made of, as hashes, and the claim of an output folder by one run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afa.checkpoint.aggregator_files import check_file
from afa.checkpoint.manifest import AGGREGATORS, MANIFEST, is_pinned, read_manifest
from afa.checkpoint.sources import Given, find_experts
from afa.errors import UserError
from afa.experts.locate import Located, locate, locate_frame
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.spec import ExpertSpec
from afa.files import json_or_none, present, refuse_busy, settled, sha256, write_atomically
from afa.schema import build

Files = dict[str, str]  # "expert 'photo', unet/config.json" -> sha256
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model")
FRAMES = ("frame", "tokenizer", "scheduler")  # parts of a saved ensemble that a frame on the hub may give
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a pipeline that no command uses


Place = str | Path | None


def fingerprint(experts: Sequence[str | ExpertSpec] = (), **others: Place | Sequence[str]) -> Files:
    """Return the sha256 of every file that decides what experts and other models compute, LoRAs included.

    experts: as the user gave them
    others:  by their name in a sentence, `vae="./vae"`: a folder, a file, or the spelling of an expert, or
             several of them; names of experts and of known configs need no hash. Of a `frame` on the hub,
             configs and tokenizers
    Raises UserError for an expert that is not there.
    """
    specs = [spec if isinstance(spec, ExpertSpec) else ExpertSpec.parse(spec) for spec in experts]
    found: Files = {}
    for spec in specs:
        found |= _of_expert(f"expert '{spec.name}'", locate(spec))
    names = {spec.name for spec in specs}
    for name, given in others.items():
        several = isinstance(given, Sequence) and not isinstance(given, str)
        for number, place in enumerate(given if several else [given], 1):  # type: ignore[arg-type]
            if place is None or str(place) in names or str(place) in KNOWN_CONFIGS:
                continue
            what = f"the {name.replace('_', ' ')}{f' {number}' if several else ''}"
            if Path(place).exists():
                found |= _of_place(what, Path(place))
            elif name in FRAMES:
                found |= _of_place(what, locate_frame(str(place)).path)
            else:
                found |= _of_expert(what, locate(ExpertSpec.parse(str(place))))
    return found


def saved_fingerprint(folder: Path, moved: Given = ()) -> Files:
    """Return the same for a saved ensemble: its manifest and aggregators, its experts, its frame.

    moved: new places of experts, see find_experts
    Raises UserError for a broken copy, and if experts are not found.
    """
    manifest = read_manifest(settled(folder))
    check_file(folder, manifest)  # before anything is searched for what may be a broken copy
    given = find_experts(manifest, folder, moved)
    names = {spec.name for spec in given}
    frame: dict[str, str | Path] = {
        part: choice if is_pinned(choice, folder) else folder / choice
        for part, choice in manifest.frame.items()
        if choice not in names
    }
    own = {f"the ensemble, {name}": sha256(folder / name) for name in (MANIFEST, AGGREGATORS)}
    return own | fingerprint(given, **frame)


def digest(facts: Any) -> str:
    """Return the sha256 of anything that JSON can hold; other values are taken as text."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def summed(files: Files) -> Files:
    """Return one hash for each expert or other source, for places where all files would be too long."""
    sources = dict.fromkeys(name.partition(", ")[0] for name in files)
    return {
        source: digest({name: found for name, found in files.items() if name.startswith(f"{source}, ")})
        for source in sources
    }


def changed(begun: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a clause for every file that has changed; it names the expert and the file."""
    return [
        f"{name} has {_short(now.get(name))} (then {_short(begun.get(name))})"
        for name in sorted({*begun, *now})
        if begun.get(name) != now.get(name)
    ]


def _short(found: str | None) -> str:
    return "no file" if found is None else f"sha256 {found[:12]}…"


def _of_expert(what: str, located: Located) -> Files:
    paths = enumerate((Path(lora.path) for lora in located.spec.loras), 1)
    loras = {f"{what}, LoRA {number} {path.name}": sha256(path) for number, path in paths}
    return _of_place(what, located.path) | loras


def _of_place(what: str, place: Path) -> Files:
    """Hash a file, or the files of a folder's parts; weights beside a pipeline's parts are ignored."""
    if place.is_file():
        return {f"{what}, {place.name}": sha256(place)}
    if not place.is_dir():
        return {}
    pipeline = (place / "model_index.json").is_file()
    parts = [
        path
        for path in sorted(place.iterdir())
        if path.is_dir() and path.name not in UNUSED and not path.name.startswith(".")
    ]
    files = [
        path
        for path in sorted(place.iterdir())
        if path.is_file() and (path.suffix == ".json" or not pipeline)
    ]
    files += [path for part in parts for path in sorted(part.iterdir()) if path.is_file()]
    return {
        f"{what}, {path.relative_to(place).as_posix()}": sha256(path)
        for path in files
        if path.suffix in SUFFIXES
    }


NOTE = "settings.json"
FILES = "sha256 of files"  # the entry of the note that holds them


def check_claim(folder: Path, asked: Mapping[str, Any], what: str, files: Files | None = None) -> None:
    """Raise UserError for a folder of another run, of other content, or to which another process writes.

    A folder in which nothing has been made yet is free: a mistyped option can be corrected.
    asked: options by field; names with a space are no flags
    what:  what is made there, as in "the search"
    files: what it is made from
    """
    if folder.is_file():
        raise UserError(f"--output {folder} is a file; give a folder")
    refuse_busy(folder)
    there = {path.name for path in present(folder)}
    if there - {NOTE} and NOTE not in there:
        raise UserError(f"--output {folder} holds other files; choose another folder")
    if there - {NOTE}:
        begun = _read(folder / NOTE)
        check_same(begun, {**_plain(asked), FILES: files or {}}, f"{what} in {folder}")


def begun_with(folder: Path) -> dict[str, Any]:
    """Return the options with which the run in a folder was begun; empty if nothing was made there yet."""
    there = {path.name for path in present(folder)}
    return _read(folder / NOTE) if NOTE in there and there != {NOTE} else {}


def claim(folder: Path, asked: Mapping[str, Any], what: str, files: Files | None = None) -> None:
    """Check a folder, and note settings and files in it; see check_claim. The folder should be locked."""
    check_claim(folder, asked, what, files)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / NOTE
    text = json.dumps({**_plain(asked), FILES: files or {}}, indent=1)
    if not note.exists() or note.read_text() != text:
        write_atomically(note, text)


def check_same(begun: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raise UserError that names every option and file that differs.

    begun, now: options by field; hashes under FILES, if they were noted
    """
    options = [
        f"{_flag(name)} {value} (now {now.get(name)})"
        for name, value in begun.items()
        if name != FILES and now.get(name) != value
    ]
    if options:
        raise UserError(
            f"{what} was begun with {', '.join(options)}; use the same options, or another --output"
        )
    then = build(dict[str, str] | None, begun.get(FILES), what, FILES)
    files = changed(then, now.get(FILES) or {}) if then else []
    if files:
        more = f", and {len(files) - 3} more" if len(files) > 3 else ""
        raise UserError(
            f"{what} was begun with other files: {', '.join(files[:3])}{more}; restore them, "
            "or choose another --output"
        )


def _read(note: Path) -> dict[str, Any]:
    found = json_or_none(note)
    if not isinstance(found, dict) or not isinstance(found.get(FILES, {}), dict):
        raise UserError(
            f"{note} is damaged, so it is not known what was begun in its folder; choose another --output"
        )
    return found


def _plain(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as they come back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(asked)))
    return plain


def _flag(name: str) -> str:
    return name if " " in name else f"--{name.replace('_', '-')}"
