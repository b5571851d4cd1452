"""Tensors that several experts share: copies around them, which stay shared when they are moved or cast, and count once."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Owner = tuple[dict[str, Any], str]  # a module's table of parameters or buffers, and a name in it


def shared_copy(module: Model) -> Model:
    """A copy of a module's structure around its own parameters and buffers: what changes one tensor changes both."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def applied(module: nn.Module, apply: Callable[[], Any]) -> Any:
    """Run an `_apply` of a module (a move, a cast) so that tensors which several of its parts share are shared afterwards, too.

    torch casts a shared parameter in place, but gives every owner of a buffer a new one, and of a parameter where it cannot be
    changed in place (to or from the meta device, or under torch.__future__'s flags).
    """
    shared = [owners for owners in _owners(module).values() if len(owners) > 1]
    result = apply()
    for (table, name), *others in shared:
        for other, its_name in others:
            other[its_name] = table[name]
    return result


def _owners(module: nn.Module) -> dict[int, list[Owner]]:
    """Who has each tensor, by its identity."""
    found: dict[int, list[Owner]] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((table, name))
    return found


def unshare(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module parameters of its own, by name, so that they can be changed without changing another's."""
    for name in names:
        place, _, last = name.rpartition(".")
        owner = module.get_submodule(place)
        old = owner._parameters[last]
        if old is not None:
            owner._parameters[last] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)


def base_of(module: nn.Module) -> int:
    """What is equal for models that share their weights, whatever LoRAs are beside them: the identity of their first parameter.

    Weights that are stored in 8 bits are no parameters; biases and norms always are.
    """
    return id(next(parameter for name, parameter in module.named_parameters() if "lora_" not in name))


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory some tensors lie in; what several of them share counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
