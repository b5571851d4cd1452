"""What an ensemble's repository holds: names in place of this machine's folders, and no code but ours."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from afa.checkpoint.aggregator_files import check_file
from afa.checkpoint.card import Origin, bases, model_card
from afa.checkpoint.manifest import (
    AGGREGATORS,
    MANIFEST,
    ExpertEntry,
    LoraEntry,
    Manifest,
    check_hashes,
    is_pinned,
    public_record,
    read_manifest,
)
from afa.checkpoint.sources import Given, find_experts
from afa.errors import UserError
from afa.experts.folders import public_config, weight_files
from afa.experts.locate import SUFFIXES, Located, hash_expert, locate
from afa.experts.parts import component_of, read_index
from afa.experts.shipped import KNOWN_CONFIGS
from afa.files import present, settled, staged
from afa.hub_files import hub_file
from afa.places import HUB_ID, public_place, spelled
from afa.version import __version__

SETTINGS = (".json", ".txt", ".model", ".jinja")  # of configs and tokenizers
PARTS = ("experts", "frame", "config")  # folders of what is copied in
SPEED = "speed.json"  # of afa calibrate
CARD = "README.md"
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
LARGEST_CARD = 1 << 20  # bytes
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # of pipelines: no ensemble reads them
# diffusers runs these two if its user says trust_remote_code; afa itself never does.
PIPELINE = '''"""Lets DiffusionPipeline.from_pretrained(PLACE, trust_remote_code=True) load this ensemble."""

from diffusers import DiffusionPipeline


class AfaPipeline(DiffusionPipeline):
    """Stands for the stock pipeline of the experts' architecture, which is what one gets."""

    def __new__(cls, ensemble):
        return ensemble.pipeline()

    def __init__(self, ensemble):  # diffusers reads the names of the components here
        super().__init__()
'''
LOADER = '''"""Lets diffusers load the ensemble in the folder above; needs afa."""

from pathlib import Path

import torch
from afa import Ensemble


class Loader(torch.nn.Module):
    """Has the method that diffusers calls for a component."""

    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None, **options):
        return Ensemble.from_pretrained(Path(folder).parent, dtype=torch_dtype)
'''


def diffusers_files() -> dict[str, str]:
    """The files by which diffusers loads the folder: name -> content."""
    index = {
        "_class_name": ["pipeline", "AfaPipeline"],
        "_diffusers_version": "0.42.0",
        "ensemble": ["loader", "Loader"],
    }
    return {
        "model_index.json": json.dumps(index, indent=2) + "\n",
        "pipeline.py": PIPELINE,
        "ensemble/loader.py": LOADER,
    }


@dataclass
class Publication:
    """An ensemble as it is published.

    manifest: with names in place of this machine's folders
    files:    name in the repository -> a file here, or its content
    private:  names of the experts that only this machine has: whoever loads the ensemble must have them too
    """

    manifest: Manifest
    files: dict[str, Path | str]
    private: list[str]

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(
            file.stat().st_size if isinstance(file, Path) else len(file.encode())
            for file in self.files.values()
        )

    def write(self, folder: Path) -> None:
        """Write all files, or none. Raises UserError for a folder that holds something else."""
        there = {path.name for path in present(folder)}
        if there and MANIFEST not in there:
            raise UserError(f"{folder} is not empty, and holds no ensemble; give a new folder")
        with staged(folder, last=MANIFEST) as stage:
            for name, file in self.files.items():
                target = stage / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(file, Path):
                    shutil.copyfile(file, target)
                else:
                    target.write_text(file, encoding="utf-8")


def publication(
    folder: Path,
    *,
    bundle: bool = False,
    given: Given = (),
    licence: str | None = None,
    repository: str | None = None,
) -> Publication:
    """Say what a saved ensemble's repository holds. Nothing is copied; weights are read for hashes only.

    folder:     of the ensemble
    bundle:     with the experts; those in the ensemble's own folder are always part of it
    given:      new places of experts, see find_experts
    licence:    of the card; None: the experts' own, if all have the same
    repository: org/name, for the card; None: a folder
    Raises UserError for an ensemble, or with bundle for an expert, that is not complete or has changed.
    """
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(f"--license {licence} is no identifier such as apache-2.0 or creativeml-openrail-m")
    manifest = read_manifest(settled(folder))
    check_file(folder, manifest)
    files: dict[str, Path | str] = {AGGREGATORS: folder / AGGREGATORS}
    if (folder / SPEED).is_file():
        files[SPEED] = folder / SPEED
    specs = find_experts(manifest, folder, given) if bundle else []
    found: list[Located | None] = [locate(spec) for spec in specs]
    places = found or [_place(entry, folder) for entry in manifest.experts]
    copied: dict[Path, str] = {}
    pairs = list(zip(manifest.experts, places, strict=True))
    entries = [
        _bundled(entry, place, files, copied)
        if place is not None and (bundle or _is_in(place.path, folder))
        else _referred(entry, folder)
        for entry, place in pairs
    ]
    origin = Origin(licence, {entry.name: _licence(entry, place) for entry, place in pairs}, bases(manifest))
    published = replace(
        manifest,
        experts=[_with_config(entry, folder, files) for entry in entries],
        frame=_frame(manifest, folder, files),
        training=public_record(manifest.training),
        afa_version=__version__,
    )
    files |= diffusers_files()
    files[CARD] = model_card(published, origin, repository)
    files[MANIFEST] = published.to_json()
    private = [entry.name for entry in entries if not _public(entry)]
    return Publication(published, files, private)


def own_files(manifest: Manifest) -> list[str]:
    """Patterns of the files that loading a downloaded ensemble may read; none of them can be code."""
    names = {entry.name for entry in manifest.experts}
    paths = [choice for choice in manifest.frame.values() if choice not in names]
    for entry in manifest.experts:
        paths += [entry.source, *(lora["path"] for lora in entry.loras)]
        if entry.config is not None and entry.config not in KNOWN_CONFIGS:
            paths.append(entry.config)
    plain = [re.sub(r"([*?[])", r"[\1]", path.removeprefix("./")) for path in paths]
    kinds = (*SUFFIXES, *SETTINGS)
    inside = [path for path in plain if not path.startswith("/") and ".." not in path.split("/")]
    single = [path for path in inside if path.endswith(kinds)]
    below = [f"{path}/*{kind}" for path in inside if path not in single for kind in kinds]
    return [MANIFEST, AGGREGATORS, SPEED, CARD, *single, *below]


def _public(entry: ExpertEntry) -> bool:
    """Whether every machine can find an expert: in the repository, on the hub, or in afa."""
    return entry.commit is not None or entry.source.startswith(("demo:", "experts/"))


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder, as in that of an ensemble that was saved with its experts."""
    return path.resolve().is_relative_to(folder.resolve())


def _place(entry: ExpertEntry, folder: Path) -> Located | None:
    """Where an expert is here, for its licence; None if it is not here."""
    spec = entry.spec(folder)
    return Located(spec, Path(spec.source)) if Path(spec.source).exists() else None


def _referred(entry: ExpertEntry, folder: Path) -> ExpertEntry:
    """The entry of an expert that is not copied, with its name in place of this machine's folders."""
    loras: list[LoraEntry] = [{**lora, "path": public_place(lora["path"])} for lora in entry.loras]
    embedded = spelled(folder / entry.source)
    source = entry.source if entry.commit is not None else embedded or public_place(entry.source)
    return replace(entry, source=source, loras=loras)


def _bundled(
    entry: ExpertEntry, place: Located, files: dict[str, Path | str], copied: dict[Path, str]
) -> ExpertEntry:
    """The entry of an expert that is copied; experts with LoRAs on one base share its copy.

    files:  what is published, to which the expert's files are added
    copied: path -> name in the repository, of the experts before
    """
    check_hashes(entry, place)
    name = f"experts/{entry.name}"
    source = place.path.resolve()
    if source not in copied:
        copied[source] = _add(place.path, name, files)
    loras: list[LoraEntry] = [
        {"path": _add(Path(lora.path), f"{name}-lora{index}", files), "strength": lora.strength}
        for index, lora in enumerate(place.spec.loras)
    ]
    hashes = hash_expert(place)
    if place.single_file:
        hashes[Path(copied[source]).name] = hashes.pop(place.path.name)
    return replace(entry, source=copied[source], commit=None, loras=loras, files=hashes)


def _with_config(entry: ExpertEntry, folder: Path, files: dict[str, Path | str]) -> ExpertEntry:
    """The entry with its config copied in, if that is a folder or file here."""
    if entry.config is None or entry.config in KNOWN_CONFIGS:
        return entry
    return replace(entry, config=_add(folder / entry.config, "config/pipeline", files))


def _frame(manifest: Manifest, folder: Path, files: dict[str, Path | str]) -> dict[str, str]:
    """The frame with the parts copied in that are no experts', nor the hub's; its folder is copied once."""
    names = {entry.name for entry in manifest.experts}
    return {
        part: choice
        if choice in names or is_pinned(choice, folder)
        else _add(
            folder / choice, f"frame/{'pipeline' if choice == manifest.frame.get('frame') else part}", files
        )
        for part, choice in manifest.frame.items()
    }


def _add(source: Path, name: str, files: dict[str, Path | str]) -> str:
    """Add a file, or a model's folder, to what is published: -> its name there."""
    if source.is_file():
        name += source.suffix
        files[name] = source
        return name
    if not source.is_dir():
        raise UserError(f"{source} is not there, which the ensemble needs; put it back, or save it again")
    for file in _model_files(source, name.startswith("frame/pipeline")):
        content = public_config(file)
        files[f"{name}/{file.relative_to(source).as_posix()}"] = file if content is None else content
    return name


def _model_files(folder: Path, without_denoiser: bool) -> Iterator[Path]:
    """The files of a model's folder that are read: settings, and the weights that are loaded."""
    index = read_index(folder) if (folder / "model_index.json").is_file() else {}
    left_out = {*UNUSED, *([component_of(folder, index)] if without_denoiser and index else [])}
    parts = [part for part in sorted(index) if part not in left_out and (folder / part).is_dir()]
    for place in (folder, *(folder / part for part in parts)):
        names = sorted(path.name for path in place.iterdir() if path.is_file())
        # beside a pipeline's components may lie other weights, which are not read
        own = (place != folder or not index) and any(name.endswith(".safetensors") for name in names)
        weights = {file.name for file in weight_files(place).files} if own else set()
        yield from (place / name for name in names if name.endswith(SETTINGS) or name in weights)


def _licence(entry: ExpertEntry, place: Located | None) -> str | None:
    """The licence that an expert's own card names, here or on the hub; None if it is not known."""
    card = None if place is None or place.single_file else place.path / CARD
    if card is not None and card.is_file() and card.stat().st_size <= LARGEST_CARD:
        return _named(card)
    if entry.commit is None or not HUB_ID.fullmatch(entry.source):
        return None
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        repository = "/".join(entry.source.split("/")[:2])
        return _named(hub_file(repository, CARD, entry.commit))
    except (HTTPError, LocalEntryNotFoundError, OSError):
        return None


def _named(card: Path) -> str | None:
    """The licence in a card's metadata; None if it has none that is an identifier."""
    from huggingface_hub import metadata_load

    try:
        licence = (metadata_load(card) or {}).get("license")
    except Exception:  # a stranger's YAML: whatever is wrong with it, the licence is not known
        return None
    return licence if isinstance(licence, str) and LICENCE.fullmatch(licence) else None


def stale(there: Sequence[str], files: dict[str, Path | str]) -> list[str]:
    """The files of a repository that an earlier upload put there and that are no longer part of it."""
    return [name for name in there if name.split("/")[0] in PARTS and name not in files]
