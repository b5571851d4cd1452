"""LoRAs of experts: beside weights that several experts share, or fused into the weights of one.

Experts on one base keep its weights in memory once: each is a copy of the structure around the very same tensors, with its
LoRAs left beside them. An expert's own LoRA is part of it: what pipelines do to LoRAs (scale, switch off, unload) passes it by.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from afa.denoiser.lora import OWN, activate, adapter_parameters, settle, tuner_layers
from afa.denoiser.lora_layers import lora_states
from afa.denoiser.sharing import Model, shared_copy
from afa.errors import UserError
from afa.experts.finite import is_finite
from afa.experts.headers import read_header
from afa.experts.locate import Located, locate
from afa.experts.lora_files import read_lora
from afa.experts.own import make_own
from afa.experts.spec import ExpertSpec, Lora
from afa.families.table import FAMILIES

if TYPE_CHECKING:
    from afa.experts.load import Expert

UP = ".lora_B.weight"

def load_sharing(sources: Sequence[Any], load: Callable[[Any], "Expert"]) -> list["Expert"]:
    """Load experts, each base that several of them name once. An expert alone on its base has its LoRAs fused into it.

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
    """What experts on one base have in common: where it lies; None for what shares nothing (objects, bare denoisers)."""
    return located.path.resolve() if located is not None and located.whole_pipeline else None


def on_base(base: "Expert", located: Located) -> "Expert":
    """Another expert of the same weights, which stay in memory once, with LoRAs of its own beside them."""
    encoders = [shared_copy(encoder) for encoder in base.text_encoders]
    model = shared_copy(base.model)
    expert = dataclasses.replace(base, name=located.spec.name, model=model, text_encoders=encoders, located=located, hashes={})
    add_own(expert, located.spec.loras)
    both = zip(encoders, base.text_encoders, strict=True)
    expert.text_encoders = [mine if any(tuner_layers(mine)) else theirs for mine, theirs in both]  # untouched ones are one object
    return expert


def add_own(expert: "Expert", loras: Sequence[Lora]) -> None:
    """Put LoRA files beside an expert's weights, as part of it. Raises UserError for one that does not fit, or is another kind."""
    names = [f"{OWN}{index}" for index in range(len(loras))]
    parts = lora_parts(expert)
    for name, lora in zip(names, loras, strict=True):
        load_lora(parts, lora.path, name, f"expert '{expert.name}'")
    for module in parts.values():
        present = [(name, lora.strength) for name, lora in zip(names, loras, strict=True) if adapter_parameters(module, name)]
        if present:
            activate(module, [name for name, _ in present], [strength for _, strength in present])
        for _, layer in tuner_layers(module):
            make_own(layer, names)


def lora_parts(expert: "Expert") -> dict[str, Any]:
    """What a LoRA can change of an expert, by the names in a pipeline: the denoiser first, then the text encoders."""
    from afa.experts.load import TEXT_ENCODERS

    return {FAMILIES[expert.family].component: expert.model, **dict(zip(TEXT_ENCODERS, expert.text_encoders, strict=False))}


def load_lora(parts: Mapping[str, Any], source: Any, name: str, where: str, **options: Any) -> None:
    """Put a LoRA beside the weights of some models as an adapter of that name: all of it, or nothing.

    parts: the denoiser first, then text encoders, by their names in a pipeline.
    source, options: see afa.experts.lora_files.read_lora.
    where: whose models they are, for messages.
    Raises UserError for one that is of another kind, is broken, or does not fit.
    """
    what, tensors, config = read_lora(source, **options)
    for part, state in lora_states(tensors, parts, what, where, config).items():
        attach(parts[part], state, name)
        settle(parts[part], name)


def attach(module: Any, state: dict[str, Tensor], name: str) -> None:
    """Put one model's part of a LoRA beside its weights. state: as lora_states makes it, every layer of alpha = rank."""
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
    return sum(prod(entry["shape"]) for header in headers for key, entry in header.items() if "alpha" not in key)


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
                raise UserError(f"{name}.weight does not fit {base.weight.dtype} with the LoRA in it; {advice}")
        module.set_submodule(name, base)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        module.__dict__.pop(mark, None)
    return module


def fused(module: Model) -> Model:
    """A model as it computes, without LoRAs beside its weights: itself if it has none, else a copy with weights of its own."""
    return fuse(copy.deepcopy(module)) if any(tuner_layers(module)) else module
