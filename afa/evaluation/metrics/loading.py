"""From weight files to networks: names and shapes are checked at once, the weights are read when they are first needed."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.headers import check_fit, read_folder

Network = TypeVar("Network", bound=nn.Module)
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a pickled state dict, on the CPU; mapped, not read, where the format allows.

    Nothing but tensors is unpickled. Raises UserError if the file is broken, or something else.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with file.open("rb") as stream:
            zipped = stream.read(2) == b"PK"  # torch's older format cannot be mapped
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UNREADABLE as error:
        raise UserError(f"{file} is no file of weights that can be read ({_first_line(error)}); download it again") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no tensors by name; is it the right file?")
    return tensors


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def check_network(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises UserError if a file lacks weights of a network, or has them in other shapes."""
    with torch.device("meta"):
        network = build()
    check_fit(network, tensors, str(where))


def load_network(build: Callable[[], Network], tensors: Mapping[str, Tensor], device: torch.device) -> Network:
    """The network with these weights in float32, ready to be used; what it does not know is left aside."""
    with torch.device("meta"):
        network = build()
    wanted = {name: tensors[name] for name in network.state_dict()}
    network.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in wanted.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)


def check_folder(maker: Any, folder: Path, **options: Any) -> None:
    """Raises UserError if a folder of transformers is not this model's, or lacks weights (seen at once unless pickled)."""
    config = _config(maker, folder)
    found = read_folder(folder)
    if found is not None:
        with torch.device("meta"):
            network = maker(config, **options)
        check_fit(network, {name: entry.meta() for name, entry in found.items()}, str(folder))


def load_folder(maker: Any, folder: Path, device: torch.device) -> Any:
    """A model of transformers from its folder, in float32. Raises UserError if weights are missing."""
    return _made(maker, folder, device, config=_config(maker, folder))


def load_transformer(maker: Any, config: Any, tensors: Mapping[str, Tensor], where: Path, device: torch.device, **options: Any) -> Any:
    """The same from tensors in memory, under the names that transformers has for them."""
    state = {name: tensor.float() for name, tensor in tensors.items()}
    return _made(maker, None, device, where=where, config=config, state_dict=state, **options)


def _made(maker: Any, source: Path | None, device: torch.device, where: Path | None = None, **options: Any) -> Any:
    try:
        model, info = maker.from_pretrained(source, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options)
    except UNREADABLE as error:
        raise UserError(f"{where or source} could not be loaded as {maker.__name__}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would draw them at random
        raise UserError(f"{where or source} lacks {len(missing)} weights of a {maker.__name__} (first: {missing[0]}); download it again")
    return model.to(device).eval().requires_grad_(False)


def _config(maker: Any, folder: Path) -> Any:
    try:
        return maker.config_class.from_pretrained(folder, local_files_only=True)
    except UNREADABLE as error:
        raise UserError(f"{folder} has no config of a {maker.__name__}: {_first_line(error)}") from error
