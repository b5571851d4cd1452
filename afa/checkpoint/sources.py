"""Where an ensemble's experts are now: at their recorded places, at new ones, or found by their sha256."""

import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from afa.checkpoint.manifest import MANIFEST, ExpertEntry, Manifest
from afa.errors import UserError, unknown
from afa.experts.locate import SUFFIXES
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.spec import ExpertSpec, Lora
from afa.files import sha256
from afa.places import located, snapshot_id
from afa.schema import shown

Given = Mapping[str, str] | Sequence[str]  # name -> place; or NAME=PLACE and folders to search, as texts
LORA = re.compile(r"lora \d+")  # the names under which a manifest records the hashes of LoRAs


def find_experts(manifest: Manifest, folder: Path, given: Given = ()) -> list[ExpertSpec]:
    """Find every expert of an ensemble.

    manifest: of the ensemble
    folder:   of the ensemble
    given:    name -> new place; or a list as --experts takes it: NAME=PLACE, and folders to search
    An expert, or a LoRA of it, that is not at its place is searched by its recorded sha256: in the
    ensemble's folder, beside its recorded place, and anywhere below the folders to search. A path out of the
    folder of an ensemble that was downloaded is not followed.
    Returns the experts' specs, in order. Raises UserError that names all experts that are not found.
    """
    places, roots = _asked(given)
    names = [entry.name for entry in manifest.experts]
    for name in places:
        if name not in names:
            raise UserError(unknown(name, names, "expert of this ensemble"))
    foreign = snapshot_id(folder) is not None
    if foreign:
        _refuse_outside(manifest, folder)
    search = _Search(folder, roots, foreign)
    specs = [_spec(entry, places.get(entry.name), search) for entry in manifest.experts]
    if search.missing:
        _raise_missing(search)
    return specs


def _asked(given: Given) -> tuple[dict[str, str], list[Path]]:
    """Split what --experts takes into new places by name, and folders to search."""
    if isinstance(given, Mapping):
        return dict(given), []
    places, roots = {}, []
    for text in given:
        if Path(text).is_dir():
            roots.append(Path(text))
        elif "=" in text:
            name, _, place = text.partition("=")
            places[name] = place
        else:
            raise UserError(
                f"--experts {text} names no expert; write NAME={text}, "
                "or give a folder to search, which it is not"
            )
    return places, roots


@dataclass(frozen=True)
class _Missing:
    """What was not found. name: of the expert; what: "expert 'a'" or a LoRA of it; place: where it was."""

    name: str
    what: str
    place: str


class _Search:
    """The places to search, and what was not found there.

    folder:  of the ensemble
    roots:   folders given by the user, searched with all folders in them
    foreign: whether the ensemble was downloaded: then paths out of its folder are not followed
    """

    def __init__(self, folder: Path, roots: Sequence[Path], foreign: bool) -> None:
        self.folder, self.roots, self.foreign = folder, roots, foreign
        self.missing: list[_Missing] = []
        self.looked: list[str] = []

    def there(self, source: str) -> Path | None:
        """A recorded place that may be read and exists; None otherwise."""
        path = self.folder / located(source)
        return path if path.exists() and (not self.foreign or _inside(source, self.folder)) else None

    def found(self, missing: _Missing, source: str, hashes: Mapping[str, str]) -> Path | None:
        """Where files of these hashes are now; None, and noted as missing, if they are nowhere.

        source: the recorded place
        hashes: file name -> sha256; below a folder, or of one file
        """
        beside = [] if self.foreign else [(self.folder / source).parent]
        single = Path(source).suffix in SUFFIXES
        shallow = [(root, False) for root in (self.folder, *beside)]
        for root, deep in [*shallow, *((root, True) for root in self.roots)] if hashes else []:
            if root.is_dir() and (shown_root := os.path.normpath(root)) not in self.looked:
                self.looked.append(shown_root)
            found = _file(root, deep, source, hashes) if single else _folder(root, deep, hashes)
            if found is not None:
                _announce(missing.what, found)
                return found
        self.missing.append(missing)
        return None


@functools.cache
def _announce(what: str, place: Path) -> None:
    print(f"afa: {what} was found by its sha256 at {os.path.normpath(place)}", file=sys.stderr)


def _spec(entry: ExpertEntry, moved: str | None, search: _Search) -> ExpertSpec:
    spec = entry.spec(search.folder)
    if moved is not None:
        other = ExpertSpec.parse(moved)
        loras = other.loras or tuple(_loras(entry, search))
        return ExpertSpec(entry.name, other.source, other.revision, loras)
    loras = tuple(_loras(entry, search))
    if entry.commit is not None or search.there(entry.source):
        return replace(spec, loras=loras)
    hashes = {name: digest for name, digest in entry.files.items() if not LORA.fullmatch(name)}
    missing = _Missing(entry.name, f"expert '{entry.name}'", _place(entry.source, search.folder))
    found = search.found(missing, entry.source, hashes)
    return replace(spec, source=str(found or spec.source), loras=loras)


def _loras(entry: ExpertEntry, search: _Search) -> Iterator[Lora]:
    for index, lora in enumerate(entry.loras):
        path = search.there(lora["path"])
        if path is None:
            digest = entry.files.get(f"lora {index}")
            what = f"LoRA {index + 1} of expert '{entry.name}'"
            missing = _Missing(entry.name, what, _place(lora["path"], search.folder))
            path = search.found(missing, lora["path"], {} if digest is None else {"": digest})
        yield Lora(str(path or search.folder / lora["path"]), lora["strength"])


def _file(root: Path, deep: bool, source: str, hashes: Mapping[str, str]) -> Path | None:
    """The file below a folder with the one hash; files of the recorded name are read first."""
    name, (digest, *_) = Path(source).name, hashes.values()
    files = [
        place / file for place, _, names in _walk(root, deep) for file in names if file.endswith(SUFFIXES)
    ]
    files.sort(key=lambda file: (file.name != name, file))
    return next((file for file in files if file.is_file() and sha256(file) == digest), None)


def _folder(root: Path, deep: bool, hashes: Mapping[str, str]) -> Path | None:
    """The folder, a folder in it, or with `deep` anywhere below it, that has all files with their hashes."""
    for place, folders, _ in _walk(root, deep):
        for one in (place, *(place / folder for folder in sorted(folders) if not deep)):
            if all(
                (one / name).is_file() and sha256(one / name) == digest for name, digest in hashes.items()
            ):
                return one
    return None


def _walk(root: Path, deep: bool) -> Iterator[tuple[Path, list[str], list[str]]]:
    for place, folders, names in os.walk(root):
        folders.sort()
        yield Path(place), folders, sorted(names)
        if not deep:
            return


def _inside(source: str, folder: Path) -> bool:
    """Whether a recorded path stays in the ensemble's folder, or is a model that comes with afa."""
    if located(source) != source:
        return True
    return Path(os.path.normpath(folder / source)).is_relative_to(os.path.normpath(folder))


def _refuse_outside(manifest: Manifest, folder: Path) -> None:
    """Raise UserError for a frame or a config out of the folder: without them nothing can be loaded."""
    names = {entry.name for entry in manifest.experts}
    parts = {f"frame.{part}": choice for part, choice in manifest.frame.items() if choice not in names}
    for place, entry in enumerate(manifest.experts):
        if entry.config is not None and entry.config not in KNOWN_CONFIGS:
            parts[f"experts[{place}].config"] = entry.config
    for key, choice in parts.items():
        if not _inside(choice, folder):
            raise UserError(
                f"{folder / MANIFEST}: {key} is {shown(choice)}, out of the folder of an ensemble that was "
                "downloaded; a repository may name only files of its own"
            )


def _place(source: str, folder: Path) -> str:
    """A recorded place for a message; one out of a downloaded ensemble as it is recorded."""
    inside = snapshot_id(folder) is None or _inside(source, folder)
    text = os.path.normpath(folder / source) if inside else source
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _raise_missing(search: _Search) -> None:
    names = list(dict.fromkeys(one.name for one in search.missing))
    where = f"; looked for by sha256 in {', '.join(search.looked)}" if search.looked else ""
    listed = "; ".join(f"{one.what} was at {one.place}, which is not there" for one in search.missing)
    new = " ".join(f"{name}=PLACE" for name in names)
    mapping = ", ".join(f"{name!r}: 'PLACE'" for name in names)
    raise UserError(
        f"{listed}{where}; give {'its new place' if len(names) == 1 else 'new places'}: --experts {new}, "
        "or a folder to search by sha256: --experts FOLDER; in Python "
        f"experts={{{mapping}}} or experts=['FOLDER']"
    )
