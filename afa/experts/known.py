"""Parts of experts that are loaded once because their files are equal: a text encoder of several gigabytes, mostly."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from afa.experts.folders import read_config, read_folder
from afa.experts.headers import Tensors, same_bytes


@dataclass
class KnownParts:
    """What has been loaded so far, with what its files hold."""

    parts: list[tuple[str, torch.dtype | None, str, Tensors, nn.Module]] = field(default_factory=list)

    def find(self, folder: Path, dtype: torch.dtype | None) -> nn.Module | None:
        """A module that was loaded from equal files: the same config, the same weights bit for bit. None if there is none.

        Weight files are read until their first difference, and kept by nobody.
        """
        settings, tensors = _read(folder)
        for known, other, kind, stored, module in self.parts:
            if (known, other, kind) == (folder.name, dtype, settings) and same_bytes(stored, tensors):
                return module
        return None

    def add(self, folder: Path, dtype: torch.dtype | None, module: nn.Module) -> None:
        """Remember a module for those that follow."""
        settings, tensors = _read(folder)
        self.parts.append((folder.name, dtype, settings, tensors, module))


def _read(folder: Path) -> tuple[str, Tensors]:
    """-> the settings as text, the tensors."""
    return json.dumps(read_config(folder), sort_keys=True), read_folder(folder)
