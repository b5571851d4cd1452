"""What is loaded when it is first used, so that help loads no torch.

Registered makers, public names of a package.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def load(place: str) -> Any:
    """Import what a registry entry names as "module:name"."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package.

    package: its name, as in __name__
    homes:   public name -> the module that defines it
    Source: PEP 562.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names
