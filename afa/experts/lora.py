"""LoRA files of an expert: found, read, checked, applied.

LoRAs of experts: beside weights that several experts share, or fused into the weights of one.

Experts on one base keep its weights in memory once: each is a copy of the structure around the very same
tensors, with its LoRAs left beside them. An expert's own LoRA is part of it: what pipelines do to LoRAs
(scale, switch off, unload) passes it by.
"""

import copy
import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from afa.denoiser.lora import (
    OWN,
    Model,
    activate,
    adapter_parameters,
    make_own,
    settle,
    shared_copy,
    tuner_layers,
)
from afa.denoiser.lora_layers import lora_states
from afa.errors import UserError
from afa.experts.headers import first_not_finite, is_finite, read_file, read_header
from afa.experts.locate import Located, locate
from afa.experts.spec import HUB_ID, ExpertSpec, Lora
from afa.models.registry import FAMILIES, layers_of

if TYPE_CHECKING:
    from afa.experts.expert import Expert


RECORDED = "lora_adapter_metadata"  # under this name diffusers saves PEFT's settings in a file's header
WEIGHTS = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)  # as diffusers and PEFT call their files
HINTS = (
    "local_files_only",
    "low_cpu_mem_usage",
    "use_safetensors",
)  # options of diffusers that change nothing here


def read_lora(source: Any, **options: Any) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """A LoRA's name for messages, its tensors, and PEFT's settings if they are recorded.

    source: a .safetensors file, a folder, a hub id that is in the hub's cache, or the tensors themselves by
    their keys.
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
        raise UserError(
            f"{what} is no .safetensors file; convert it first (pickles can run code and are not read)"
        )
    read_file(file)  # says what is wrong with a broken one
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        recorded = (opened.metadata() or {}).get(RECORDED)
    beside = file.with_name("adapter_config.json")
    config = _json(recorded, f"the header of {file}") if recorded else {}
    if beside.is_file():
        config = _json(beside.read_text(errors="replace"), str(beside))
    elif not config and any(key.startswith("base_model.model.") for key in tensors):
        print(
            f"afa: {what} records no alpha and has no adapter_config.json beside it; alpha = rank is taken",
            file=sys.stderr,
        )
    return what, _checked(what, tensors), config


def _checked(what: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors as they are. Raises UserError for what is none; a layer whose alpha is 0 is warned of."""
    strange = next(
        (
            key
            for key, value in tensors.items()
            if not isinstance(key, str) or not isinstance(value, torch.Tensor)
        ),
        None,
    )
    if strange is not None:
        raise UserError(f"{what}: {strange} is no tensor; give a file, or its tensors by their keys")
    broken = first_not_finite(tensors.items())
    if broken is not None:
        raise UserError(
            f"{what}: {broken} is not finite (NaN or infinite numbers); the file is broken: "
            "download or export it again"
        )
    nothing = [
        key
        for key, value in tensors.items()
        if key.endswith(".alpha") and not value.is_meta and not value.any()
    ]
    if nothing:
        print(
            f"afa: {what}: alpha is 0 in {len(nothing)} layers ({nothing[0]} …), which change nothing",
            file=sys.stderr,
        )
    return tensors


def _file(
    source: str,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    **hints: Any,
) -> Path:
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
        raise UserError(
            f"LoRA {source} is neither a file or folder here nor in the hub's cache; download it first"
        ) from None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the LoRA's settings in {where} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"the LoRA's settings in {where} are no table; download or export it again")
    return found


UP = ".lora_B.weight"


def load_sharing(sources: Sequence[Any], load: Callable[[Any], "Expert"]) -> list["Expert"]:
    """Load experts, each base that several of them name once.

    An expert alone on its base has its LoRAs fused into it.

    load: reads one expert, whatever it is given as.
    """
    found = [locate(source) if isinstance(source, ExpertSpec) else None for source in sources]
    places = [place_of(located) for located in found]
    bases: dict[Path, Expert] = {}
    experts = []
    for source, located, place in zip(sources, found, places, strict=True):
        if located is None or place is None or places.count(place) == 1:
            experts.append(load(source))
            continue
        if place not in bases:
            bases[place] = load(dataclasses.replace(located.spec, loras=()))
        experts.append(on_base(bases[place], located))
    return experts


def place_of(located: Located | None) -> Path | None:
    """Return a key that is equal for experts on one base; None for objects and bare denoisers."""
    return located.path.resolve() if located is not None and located.whole_pipeline else None


def on_base(base: "Expert", located: Located) -> "Expert":
    """Another expert of the same weights, which stay in memory once, with LoRAs of its own beside them."""
    encoders = [shared_copy(encoder) for encoder in base.text_encoders]
    model = shared_copy(base.model)
    expert = dataclasses.replace(
        base, name=located.spec.name, model=model, text_encoders=encoders, located=located, hashes={}
    )
    add_own(expert, located.spec.loras)
    both = zip(encoders, base.text_encoders, strict=True)
    expert.text_encoders = [
        mine if any(tuner_layers(mine)) else theirs for mine, theirs in both
    ]  # untouched ones are one object
    return expert


def add_own(expert: "Expert", loras: Sequence[Lora]) -> None:
    """Put LoRA files beside an expert's weights, as part of it.

    Raises UserError for one that does not fit, or is another kind.
    """
    names = [f"{OWN}{index}" for index in range(len(loras))]
    parts = lora_parts(expert)
    for name, lora in zip(names, loras, strict=True):
        load_lora(parts, lora.path, name, f"expert '{expert.name}'")
    for module in parts.values():
        present = [
            (name, lora.strength)
            for name, lora in zip(names, loras, strict=True)
            if adapter_parameters(module, name)
        ]
        if present:
            activate(module, [name for name, _ in present], [strength for _, strength in present])
        for _, layer in tuner_layers(module):
            make_own(layer, names)


def lora_parts(expert: "Expert") -> dict[str, Any]:
    """Return the parts of an expert that a LoRA can change, by pipeline name; the denoiser is first."""
    from afa.experts.expert import TEXT_ENCODERS

    return {
        FAMILIES[expert.family].component: expert.model,
        **dict(zip(TEXT_ENCODERS, expert.text_encoders, strict=False)),
    }


def load_lora(parts: Mapping[str, Any], source: Any, name: str, where: str, **options: Any) -> None:
    """Put a LoRA beside the weights of some models as an adapter of that name: all of it, or nothing.

    parts: the denoiser first, then text encoders, by their names in a pipeline.
    source, options: see afa.experts.lora.read_lora.
    where: whose models they are, for messages.
    Raises UserError for one that is of another kind, is broken, or does not fit.
    """
    what, tensors, config = read_lora(source, **options)
    for part, state in lora_states(tensors, parts, what, where, layers_of, config).items():
        attach(parts[part], state, name)
        settle(parts[part], name)


def attach(module: Any, state: dict[str, Tensor], name: str) -> None:
    """Put one model's part of a LoRA beside its weights.

    state: as lora_states makes it, every layer of alpha = rank.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    ranks = {key.removesuffix(UP): tensor.shape[1] for key, tensor in state.items() if key.endswith(UP)}
    pattern = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items()}
    config = LoraConfig(
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=list(ranks),
        use_dora=any(key.endswith("lora_magnitude_vector") for key in state),
        lora_bias=any(key.endswith("lora_B.bias") for key in state),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several LoRAs are meant
        inject_adapter_in_model(config, module, adapter_name=name, state_dict=state)
        set_peft_model_state_dict(module, state, adapter_name=name)
    module._hf_peft_config_loaded = True  # as diffusers and transformers mark a model with adapters


def lora_numbers(located: Located | None) -> int:
    """How many numbers the LoRAs of an expert have, by the headers of their files."""
    headers = [read_header(Path(lora.path)) for lora in located.spec.loras] if located else []
    return sum(
        prod(entry["shape"]) for header in headers for key, entry in header.items() if "alpha" not in key
    )


def fuse(module: Model) -> Model:
    """Add the LoRAs that are on into a model's own weights, in place, and leave plain layers behind.

    Raises UserError for a weight that does not fit the model's dtype with the LoRA in it.
    """
    for name, layer in list(tuner_layers(module)):
        base = layer.get_base_layer()
        if not layer.merged and not layer.disable_adapters:
            layer.merge()
            if not is_finite(base.weight):
                advice = "load the experts in float32, or make the LoRA weaker"
                raise UserError(
                    f"{name}.weight does not fit {base.weight.dtype} with the LoRA in it; {advice}"
                )
        module.set_submodule(name, base)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        module.__dict__.pop(mark, None)
    return module


def fused(module: Model) -> Model:
    """Return a model with its LoRAs fused into the weights: a copy, or the model itself if it has no LoRA."""
    return fuse(copy.deepcopy(module)) if any(tuner_layers(module)) else module
