"""From weight files to networks: names and shapes are checked at once, the weights are read when they are first needed."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from afa.errors import UserError
from afa.experts.headers import check_fit, load_tensors, read_header

Network = TypeVar("Network", bound=nn.Module)
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a pickled state dict, on the CPU; mapped, not read, where the format allows.

    Nothing but tensors is unpickled. Raises UserError if the file is broken, or something else.
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
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in wanted.items()}
    network.load_state_dict(single, assign=True)
    return network.to(device).eval().requires_grad_(False)


def check_folder(maker: Any, folder: Path) -> None:
    """Raises UserError if a folder of transformers is not this model's, or lacks weights. Nothing is read but headers."""
    _made(maker, folder, folder, device_map="meta")


def load_folder(maker: Any, folder: Path, device: torch.device) -> Any:
    """A model of transformers from its folder, in float32. Raises UserError if weights are missing."""
    return _made(maker, folder, folder).to(device)


def check_transformer(maker: Any, config: Any, tensors: Mapping[str, Tensor], where: Path, **options: Any) -> None:
    """Raises UserError if tensors, under the names that transformers has for them, are not all that a model needs."""
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    _made(maker, None, where, config=config, state_dict=shapes, device_map="meta", **options)


def load_transformer(
    maker: Any, config: Any, tensors: Mapping[str, Tensor], where: Path, device: torch.device, **options: Any
) -> Any:
    """A model of transformers from such tensors, in float32."""
    state = {name: tensor.float() for name, tensor in tensors.items()}
    return _made(maker, None, where, config=config, state_dict=state, **options).to(device)


def _made(maker: Any, source: Path | None, where: Path, **options: Any) -> Any:
    """By transformers' own loader, which knows older names. What it would draw at random, or leave out, is an error."""
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
        raise UserError(f"{where} lacks {len(missing)} weights of a {maker.__name__} (first: {missing[0]}); download it again")
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what is missing; ours is one sentence."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
