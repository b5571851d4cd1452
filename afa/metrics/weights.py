"""Find, check and load the weights of metrics."""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.headers import check_finite, check_fit, load_tensors, read_header
from afa.files import sha256
from afa.hub_files import hub_file

HUB_PLACE = re.compile(r"\w[\w.-]*/[\w.-]+(/[\w./+-]+)?")
NAMED_HASH = re.compile(
    r"-([0-9a-f]{8})\.pth?$"
)  # torch's convention: a file's name ends with the start of its sha256
WEIGHTS = (".safetensors", ".bin")
TIMEOUT = 10  # seconds until the hub must have answered


@dataclass(frozen=True)
class Part:
    """One file or folder that a metric needs.

    what:   a description
    name:   of the published file, or of a folder in transformers' layout
    hub:    org/name of a folder, or org/name/file
    url:    of the original, if it is not on the hub
    sha256: as published (whole, or its beginning), if known
    also:   other names of the same file
    folder: whether it is a folder
    """

    what: str
    name: str
    hub: str = ""
    url: str = ""
    sha256: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    folder: bool = False


@dataclass(frozen=True)
class FoundPart:
    """A part that was found on this machine.

    hashes: sha256 of its weight files
    """

    part: Part
    path: Path
    hashes: dict[str, str]

    @property
    def identity(self) -> list[str]:
        """Return what identifies the part, independent of file names."""
        return list(self.hashes.values())

    def __str__(self) -> str:
        """Return the part's description and hash; it says so if the hash is not the published one."""
        digest = self.identity[0]
        known = self.part.sha256
        published = " or ".join(each[:12] for each in known)
        others = f", not {published} as published" if known and not digest.startswith(known) else ""
        return f"{self.part.what} ({self.path.name}, sha256 {digest[:12]}{others})"


def find(metric: str, parts: Sequence[Part], given: str | None) -> list[FoundPart]:
    """Find all parts of a metric: at the given place, else in a cache, else on the hub.

    given: PLACE, or PLACE,PLACE … in the order of the parts (an empty one: the default), or a folder with the
           parts under their published names. A place is a path or a hub id. None: the defaults.
    Raises UserError with what is missing and how to give it.
    """
    count, flag = len(parts), f"--metric-weights {metric}"
    places = [] if given is None else [given]
    if given is not None and count > 1 and not Path(given).expanduser().exists():
        places = given.split(",")
    if len(places) > count:
        raise UserError(f"{flag}={given} names {len(places)} places, '{metric}' needs {count}")
    folder = count > 1 and len(places) == 1 and Path(places[0]).expanduser().is_dir()
    places = places * count if folder else [*places, *[""] * (count - len(places))]
    wanted = ["PATH" if count == 1 else f"FOLDER, a folder with {part.name} in it" for part in parts]
    advice = [f"{flag}={what}" for what in wanted]
    there = [
        _given(metric, part, place, flag, how, optional=folder)
        for part, place, how in zip(parts, places, advice, strict=True)
    ]
    if folder and not any(there):
        raise UserError(f"{flag}={given} holds none of {', '.join(part.name for part in parts)}")
    paths = [
        path or _default(metric, part, how) for part, path, how in zip(parts, there, advice, strict=True)
    ]
    return [FoundPart(part, path, _hashes(part, path)) for part, path in zip(parts, paths, strict=True)]


def _given(metric: str, part: Part, place: str, flag: str, advice: str, optional: bool) -> Path | None:
    """Return a part at the place that was given for it; None if there is no place.

    flag:     for errors: the flag, without the place
    advice:   for errors: the flag and what to give
    optional: whether the place may lack this part; then None is returned
    """
    if not place:
        return None
    path = Path(place).expanduser()
    if not path.exists():
        if not HUB_PLACE.fullmatch(place):
            raise UserError(f"{flag}={place}: there is no such file or folder")
        return _from_hub(metric, part, place, advice)
    for candidate in (path, *(path / name for name in (part.name, *part.also))):
        if (candidate / "config.json" if part.folder else candidate).is_file():
            return candidate
    if optional:
        return None
    kind = "a folder of transformers" if part.folder else "a file"
    raise UserError(f"{flag}={place} is not {part.what}: expected {kind}, as {part.name}")


def _default(metric: str, part: Part, advice: str) -> Path:
    """Return a part in torch.hub's cache, where other packages may have downloaded it, or of the hub."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in () if part.folder else (part.name, *part.also):
        if (folder / name).is_file():
            return folder / name
    if part.hub:
        return _from_hub(metric, part, part.hub, advice)
    raise UserError(f"metric '{metric}' needs {part.what}: download {part.url} and give it with {advice}")


def _from_hub(metric: str, part: Part, place: str, advice: str) -> Path:
    """Return a folder or file of the hub, from its cache or downloaded (unless the hub is switched off)."""
    fetch = _fetch_folder if part.folder else _fetch_file
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
    try:
        with suppress(Exception):  # for any reason it is not in the cache
            return fetch(place, local_files_only=True)
        if offline:
            raise OSError("HF_HUB_OFFLINE is set")
        return fetch(place, local_files_only=False)
    except Exception as error:  # the hub's, or those of any library below it
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"metric '{metric}' needs {part.what}, and {place} is neither in the hub's cache nor can it be "
            f"loaded ({reason}); "
            f"give its place with {advice}"
        ) from error


def _fetch_file(place: str, local_files_only: bool) -> Path:
    owner, name, *file = place.split("/")
    if not file:
        raise OSError(f"{place} names no file")
    where = {"local_files_only": local_files_only, "etag_timeout": TIMEOUT}
    return hub_file(f"{owner}/{name}", "/".join(file), **where)


def _fetch_folder(place: str, local_files_only: bool) -> Path:
    """Download the config and the weights only; pickled weights only if there are no others."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"local_files_only": local_files_only, "etag_timeout": TIMEOUT}
    for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
        folder = Path(snapshot_download(place, allow_patterns=["config.json", weights], **options))
        if (folder / "config.json").is_file() and _weight_files(folder):
            return folder
    raise OSError(f"{place} has no config.json with weights beside it")


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load: safetensors if there are any."""
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    return [path for path in files if path.suffix == ".safetensors"] or files


def _hashes(part: Part, path: Path) -> dict[str, str]:
    """Return the hashes of a part's files.

    Raises UserError for a file with a published name and another content.
    """
    files = [*_weight_files(path), path / "config.json"] if part.folder else [path]
    if part.folder and len(files) == 1:
        raise UserError(
            f"{path} has no weights (.safetensors or .bin) beside its config.json; download it again"
        )
    hashes = {file.name: sha256(file) for file in files}
    promised = NAMED_HASH.search(path.name) if path.name in (part.name, *part.also) else None
    if promised and not hashes[path.name].startswith(promised[1]):
        begins = f"by its name its sha256 begins with {promised[1]}, it is {hashes[path.name][:8]}…"
        raise UserError(f"{path} is damaged: {begins}; download it again")
    return hashes


Network = TypeVar("Network", bound=nn.Module)
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or a pickled state dict, on the CPU.

    They are memory-mapped if possible.

    Nothing but tensors is unpickled. Raises UserError if the file is broken, or is something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_tensors(file)
        with file.open("rb") as stream:
            zipped = stream.read(2) == b"PK"  # torch's older format cannot be mapped
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"{file} is no file of weights that can be read ({_first_line(error)}); download it again"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no tensors by name; is it the right file?")
    return tensors


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def network_loader(
    build: Callable[[], Network], tensors: Mapping[str, Tensor], where: Path
) -> Callable[[torch.device], Network]:
    """Check the weights of a network, and return a function that loads it on a device.

    The network is in float32 and in eval mode; unknown tensors are ignored.
    Raises UserError at once if a file lacks weights, or has them in other shapes; and when it loads them, if
    they hold NaN or infinity.
    """
    with torch.device("meta"):
        network = build()
    check_fit(network, tensors, str(where))

    def load(device: torch.device) -> Network:
        wanted = {name: tensors[name] for name in network.state_dict()}
        single = {name: one.float() if one.is_floating_point() else one for name, one in wanted.items()}
        network.load_state_dict(single, assign=True)
        check_finite(network, str(where))
        return network.to(device).eval().requires_grad_(False)

    return load


def folder_loader(maker: Any, folder: Path) -> Callable[[torch.device], Any]:
    """Check a folder of a transformers class by its headers, and return a function that loads it on a device.

    Raises UserError at once if the folder is not of this class, or lacks weights.
    """
    _made(maker, folder, folder, device_map="meta")
    return lambda device: _made(maker, folder, folder).to(device)


def transformer_loader(
    maker: Any, config: Any, tensors: Mapping[str, Tensor], where: Path, **options: Any
) -> Callable[[torch.device], Any]:
    """Check the tensors of a transformers model, and return a function that loads it on a device in float32.

    tensors: under the model's own names
    Raises UserError at once if they are not all that the model needs.
    """
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    _made(maker, None, where, config=config, state_dict=shapes, device_map="meta", **options)

    def load(device: torch.device) -> Any:
        state = {name: tensor.float() for name, tensor in tensors.items()}
        return _made(maker, None, where, config=config, state_dict=state, **options).to(device)

    return load


def _made(maker: Any, source: Path | None, where: Path, **options: Any) -> Any:
    """Load with transformers' own loader, which knows older names.

    Raises UserError for weights that are missing, or that hold NaN or infinity.
    """
    common = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    for file in source.glob("*.safetensors") if source else ():
        read_header(file)
    try:
        with _quiet():
            model, info = maker.from_pretrained(source, **common, **options)
    except UNREADABLE as error:
        raise UserError(f"{where} could not be loaded as {maker.__name__}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} weights of a {maker.__name__} (first: {missing[0]}); "
            "download it again"
        )
    if "device_map" not in options:  # on the meta device there are no numbers
        check_finite(model, str(where))
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' own report of missing weights; our error is one sentence."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
