"""From what was given as a LoRA to its tensors and the settings recorded beside them."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from afa.errors import UserError
from afa.experts.finite import first_not_finite
from afa.experts.headers import read_file
from afa.experts.spec import HUB_ID

RECORDED = "lora_adapter_metadata"  # under this name diffusers saves PEFT's settings in a file's header
WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # as diffusers and PEFT call their files
HINTS = ("local_files_only", "low_cpu_mem_usage", "use_safetensors")  # options of diffusers that change nothing here


def read_lora(source: Any, **options: Any) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """A LoRA's name for messages, its tensors, and PEFT's settings if they are recorded.

    source: a .safetensors file, a folder, a hub id that is in the hub's cache, or the tensors themselves by their keys.
    options: as diffusers' load_lora_weights has them: weight_name, subfolder, revision, cache_dir.
    Raises UserError if there is none, or it cannot be read.
    """
    unknown = set(options) - {"weight_name", "subfolder", "revision", "cache_dir", *HINTS}
    if unknown:
        raise UserError(f"load_lora_weights takes no {', '.join(sorted(unknown))} here; leave it out")
    if isinstance(source, dict):
        return "the LoRA", _checked("the LoRA", source), {}
    file = _file(str(source), **options)
    what = f"LoRA {file}"
    if file.suffix != ".safetensors":
        raise UserError(f"{what} is no .safetensors file; convert it first (pickles can run code and are not read)")
    read_file(file)  # says what is wrong with a broken one
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        recorded = (opened.metadata() or {}).get(RECORDED)
    beside = file.with_name("adapter_config.json")
    config = _json(recorded, f"the header of {file}") if recorded else {}
    if beside.is_file():
        config = _json(beside.read_text(errors="replace"), str(beside))
    elif not config and any(key.startswith("base_model.model.") for key in tensors):
        print(f"afa: {what} records no alpha and has no adapter_config.json beside it; alpha = rank is taken", file=sys.stderr)
    return what, _checked(what, tensors), config


def _checked(what: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors as they are. Raises UserError for what is none; a layer whose alpha is 0 is warned of."""
    strange = next((key for key, value in tensors.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)), None)
    if strange is not None:
        raise UserError(f"{what}: {strange} is no tensor; give a file, or its tensors by their keys")
    broken = first_not_finite(tensors.items())
    if broken is not None:
        raise UserError(f"{what}: {broken} is not finite (NaN or infinite numbers); the file is broken: download or export it again")
    nothing = [key for key, value in tensors.items() if key.endswith(".alpha") and not value.is_meta and not value.any()]
    if nothing:
        print(f"afa: {what}: alpha is 0 in {len(nothing)} layers ({nothing[0]} …), which change nothing", file=sys.stderr)
    return tensors


def _file(source: str, weight_name: str | None = None, subfolder: str | None = None, revision: str | None = None,
          cache_dir: str | None = None, **hints: Any) -> Path:  # fmt: skip
    """The file that is meant. Raises UserError if it is not there, or not the only one."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        if not HUB_ID.fullmatch(source):
            raise UserError(f"there is no LoRA file or folder {source}")
        path = _from_cache(source, revision, cache_dir)
    path = path / (subfolder or "")
    if weight_name is not None:
        if not (path / weight_name).is_file():
            raise UserError(f"there is no LoRA file {path / weight_name}")
        return path / weight_name
    files = sorted(path.glob("*.safetensors"))
    usual = [file for file in files if file.name in WEIGHTS] or files
    if len(usual) != 1:
        names = ", ".join(file.name for file in usual) or "no .safetensors file"
        raise UserError(f"{path} has {names}; say which is the LoRA with weight_name=")
    return usual[0]


def _from_cache(source: str, revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise UserError(f"LoRA {source} is neither a file or folder here nor in the hub's cache; download it first") from None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the LoRA's settings in {where} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"the LoRA's settings in {where} are no table; download or export it again")
    return found
