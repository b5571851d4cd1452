"""LoRA files of experts: found, read, checked, and applied.

Experts that are one base with different LoRAs keep its weights in memory once: each is a copy of the modules
around the same tensors, with its LoRAs beside them. The LoRAs of any other expert are fused into its weights.
A LoRA that is part of an expert does not change when a pipeline scales, disables or unloads LoRAs.
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
from afa.denoiser.lora_layers import DIFFERENCES, lora_states
from afa.errors import UserError
from afa.experts.headers import first_not_finite, is_finite, read_header
from afa.experts.locate import Located, locate
from afa.experts.spec import HUB_ID, ExpertSpec, Lora
from afa.models.registry import FAMILIES, layers_of

if TYPE_CHECKING:
    from afa.experts.expert import Expert


RECORDED = "lora_adapter_metadata"  # key of PEFT's settings in the header of a file from diffusers
WEIGHTS = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)  # diffusers' and PEFT's file names
HINTS = ("local_files_only", "low_cpu_mem_usage", "use_safetensors")  # diffusers' options without effect here


def read_lora(source: Any, **options: Any) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Read a LoRA.

    source:  a .safetensors file, a folder, a hub id in the hub's cache, or tensors by their keys
    options: weight_name, subfolder, revision, cache_dir, as in diffusers' load_lora_weights
    Returns its name for messages, its tensors, and PEFT's settings if they are recorded.
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
    read_header(file)  # raises for a broken file
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
    """The tensors, unchanged. Raises UserError for other values, NaN or infinity; warns of an alpha of 0."""
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
    """The file of a LoRA. Raises UserError if it is missing, or one of several."""
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


def holds_differences(lora: Lora) -> bool:
    """Whether a file holds differences of weights that no adapter can hold: LoHa, LoKr, DoRA, whole ones."""
    end = re.compile(rf"\.({DIFFERENCES})(\.weight)?$")
    return any(end.search(name) for name in read_header(Path(lora.path)))


def load_sharing(sources: Sequence[Any], load: Callable[[Any], "Expert"]) -> list["Expert"]:
    """Load experts; a base that several of them have is loaded once.

    sources: as load_expert takes them
    load:    loads one of them
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
    """A key that experts of one base share; None for objects, denoisers alone, and what changes the base."""
    if located is None or not located.whole_pipeline or any(map(holds_differences, located.spec.loras)):
        return None
    return located.path.resolve()


def on_base(base: "Expert", located: Located) -> "Expert":
    """Another expert with the weights of a base, which stay in memory once, and LoRAs beside them."""
    encoders = [shared_copy(encoder) for encoder in base.text_encoders]
    model = shared_copy(base.model)
    expert = dataclasses.replace(
        base, name=located.spec.name, model=model, text_encoders=encoders, located=located, hashes={}
    )
    add_own(expert, located.spec.loras)
    both = zip(encoders, base.text_encoders, strict=True)
    expert.text_encoders = [
        mine if any(tuner_layers(mine)) else theirs for mine, theirs in both
    ]  # encoders without LoRA are the base's own objects
    return expert


def add_own(expert: "Expert", loras: Sequence[Lora]) -> None:
    """Put LoRA files beside an expert's weights, as part of the expert.

    Raises UserError for a LoRA that is broken, does not fit, or is of another kind.
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
    """The models of an expert that a LoRA can change, by their names in a pipeline, the denoiser first."""
    from afa.experts.expert import TEXT_ENCODERS

    return {
        FAMILIES[expert.family].component: expert.model,
        **dict(zip(TEXT_ENCODERS, expert.text_encoders, strict=False)),
    }


def load_lora(parts: Mapping[str, Any], source: Any, name: str, where: str, **options: Any) -> None:
    """Put a LoRA beside the weights of models, all of it or nothing.

    parts:           models by their names in a pipeline, the denoiser first
    source, options: see read_lora
    name:            of the adapter
    where:           the expert, for messages
    Raises UserError for a LoRA that is broken, does not fit, or is of another kind.
    """
    what, tensors, config = read_lora(source, **options)
    for part, state in lora_states(tensors, parts, what, where, layers_of, config).items():
        attach(parts[part], state, name)
        settle(parts[part], name)


def attach(module: Any, state: dict[str, Tensor], name: str) -> None:
    """Put the part of a LoRA that belongs to one model beside its weights.

    state: as lora_states makes it, with alpha = rank in every layer
    name:  of the adapter
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
    """The number of elements in the LoRAs of an expert, by the headers of their files."""
    headers = [read_header(Path(lora.path)) for lora in located.spec.loras] if located else []
    return sum(
        prod(entry["shape"]) for header in headers for key, entry in header.items() if "alpha" not in key
    )


def fuse(module: Model) -> Model:
    """Add the active LoRAs of a model to its weights, in place, and remove the LoRA layers.

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
    """A copy of a model with its LoRAs fused into the weights; the model itself if it has no LoRA."""
    return fuse(copy.deepcopy(module)) if any(tuner_layers(module)) else module
