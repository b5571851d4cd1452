"""Copy the nodes into ComfyUI's custom_nodes."""

import json
from pathlib import Path

from afa.errors import UserError
from afa.files import json_or_none, settled, sha256, staged
from afa.version import __version__

PACK = Path(__file__).parent / "pack"
NAME = "comfyui-afa"  # of the folder in custom_nodes
RECORD = ".afa-installed.json"  # sha256 of the files that were copied, by name
MARKS = ("main.py", "comfy", "custom_nodes")  # what a folder of ComfyUI holds


def install(folder: Path) -> Path:
    """Copy the nodes; what an earlier version has copied is replaced.

    folder: of ComfyUI
    Returns the folder of the nodes. Raises UserError for a folder that is not ComfyUI's, and where files
    would be overwritten that are not ours or were changed.
    """
    missing = [name for name in MARKS if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{folder} is no folder of ComfyUI: it has no {', '.join(missing)}; give the one with main.py"
        )
    target = folder / "custom_nodes" / NAME
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is a link or a file; take it away, and repeat the command")
    ours = _pack_files()
    if target.is_dir():
        _check_ours(settled(target), ours)
    with staged(target, last=RECORD) as stage:
        for name, file in ours.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_bytes(file.read_bytes())
        record = {"afa": __version__, "files": {name: sha256(file) for name, file in ours.items()}}
        (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def _pack_files() -> dict[str, Path]:
    """The files of the nodes, by their names in the folder."""
    found = (path for path in sorted(PACK.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(PACK).as_posix(): path for path in found}


def _check_ours(target: Path, ours: dict[str, Path]) -> None:
    """Raise UserError if a file that would be overwritten or removed is not as afa wrote it."""
    record = json_or_none(target / RECORD)
    known = record.get("files") if isinstance(record, dict) else None
    known = known if isinstance(known, dict) else {}
    folders = {target / name.partition("/")[0] for name in ours if "/" in name}  # each is replaced as a whole
    beside = [
        path.relative_to(target).as_posix()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    ]
    for name in [*ours, *(name for name in beside if name not in ours)]:
        there, file = target / name, ours.get(name)
        if not there.exists() and not there.is_symlink():
            continue
        expected = (known.get(name), None if file is None else sha256(file))
        if there.is_symlink() or not there.is_file() or sha256(there) not in expected:
            raise UserError(
                f"{there} is not as afa wrote it, and would be overwritten or removed; "
                f"move {target} away, and repeat the command"
            )
