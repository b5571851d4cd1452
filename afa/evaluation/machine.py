"""Where and with what a comparison was made."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from afa import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def versions() -> dict[str, str]:
    """Of this package and of those whose versions change numbers."""
    found = {"afa": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    """In words: the accelerator, or the processor's kind and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
