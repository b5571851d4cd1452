"""LoRAs of experts: beside weights that several experts share, or fused into the weights of one.

Experts on one base keep its weights in memory once: each is a copy of the structure around the very same tensors, with its
LoRAs left beside them. An expert's own LoRA is part of it: what pipelines do to LoRAs (scale, switch off, unload) passes it by.
"""

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from afa.denoiser.lora import OWN, adapter_parameters, settle, tuner_layers
from afa.denoiser.sharing import Model, shared_copy
from afa.errors import UserError
from afa.experts.locate import Located, locate
from afa.experts.original import read_header
from afa.experts.own import make_own
from afa.experts.spec import ExpertSpec, Lora
from afa.families.table import FAMILIES

if TYPE_CHECKING:
    from afa.experts.load import Expert

LOADERS = (OSError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, TypeError)  # what diffusers' loaders raise
# What else is passed around as "a LoRA", by a piece of its keys.
OTHER_KINDS = {
    "hada_": "a LoHa (LyCORIS)",
    "lokr_": "a LoKr (LyCORIS)",
    "oft_": "an OFT (LyCORIS)",
    "on_input": "an IA3 (LyCORIS)",
    "dora_scale": "a DoRA in kohya's form",
    "lora_mid": "a LoCon with a core tensor (LyCORIS)",
    "diff_b": "a full difference of weights (LyCORIS)",
}


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
    if not loras:
        return
    names = [f"{OWN}{index}" for index in range(len(loras))]
    pipe = carrier(expert)
    for name, lora in zip(names, loras, strict=True):
        load_lora(pipe, lora.path, name, f"expert '{expert.name}'")
    pipe.set_adapters(names, [lora.strength for lora in loras])
    for module in (expert.model, *expert.text_encoders):
        for _, layer in tuner_layers(module):
            make_own(layer, names)
        for name in names:
            settle(module, name)


def carrier(expert: "Expert") -> Any:
    """A stock pipeline around an expert's models, which knows how to read LoRA files of its architecture."""
    import diffusers

    from afa.experts.load import TEXT_ENCODERS, TOKENIZERS

    family = FAMILIES[expert.family]
    maker: Any = getattr(diffusers, expert.pipeline or "", None) or getattr(diffusers, family.call.pipeline(len(expert.text_encoders)))
    taken = list(inspect.signature(maker.__init__).parameters)[1:]
    parts = {family.component: expert.model, "scheduler": expert.scheduler}
    parts |= dict(zip(TEXT_ENCODERS, expert.text_encoders, strict=False)) | dict(zip(TOKENIZERS, expert.tokenizers, strict=False))
    required = [name for name, one in inspect.signature(maker.__init__).parameters.items() if one.default is one.empty]
    missing = {name: None for name in required if name in taken and name not in parts}
    switches = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
    return maker(**{name: part for name, part in parts.items() if name in taken}, **missing, **switches)


def load_lora(pipe: Any, source: Any, name: str, where: str, **options: Any) -> None:
    """Load a LoRA into a stock pipeline as an adapter of that name, all of it.

    source: a file, or what else diffusers takes, with its options. where: whose it is, for messages. Raises UserError if it is
    of another kind or does not fit, with how many of its weights found no place.
    """
    check_kind(source)
    what = f"LoRA {source}" if isinstance(source, (str, Path)) else "the LoRA"
    try:
        with _silent():
            expected = _count(pipe, source, options)
            pipe.load_lora_weights(str(source) if isinstance(source, Path) else source, adapter_name=name, local_files_only=True, **options)
    except LOADERS as error:
        raise UserError(f"{what} does not fit {where}: {str(error).strip().partition(chr(10))[0]}") from error
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    found = sum(len(adapter_parameters(module, name)) for module in modules)
    if found < expected:
        lost = f"{expected - found} of its {expected} weights found no place"
        raise UserError(f"{what} does not fit {where}: {lost}; it was made for another architecture")


@contextmanager
def _silent() -> Iterator[None]:
    """Without the libraries' warnings of what a LoRA has nothing for, or too much of: both are counted."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity(log.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several LoRAs are meant
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)


def check_kind(source: Any) -> None:
    """Raises UserError for a file of what is called a LoRA, but is something else."""
    if not isinstance(source, (str, Path)) or not Path(source).is_file() or Path(source).suffix != ".safetensors":
        return
    keys = list(read_header(Path(source)))
    for mark, kind in OTHER_KINDS.items():
        if any(mark in key.rpartition(".")[2] or f".{mark}" in key for key in keys):
            raise UserError(f"LoRA {source} is {kind}, which diffusers does not load here; convert it to a plain LoRA")


def _count(pipe: Any, source: Any, options: dict[str, Any]) -> int:
    """How many tensors of a LoRA are to find a place."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    config = {"unet_config": pipe.unet.config} if isinstance(pipe, StableDiffusionXLLoraLoaderMixin) else {}  # names SDXL's blocks
    given = dict(source) if isinstance(source, dict) else str(source)
    read = pipe.lora_state_dict(given, local_files_only=True, **config, **options)
    return sum("alpha" not in key for key in (read[0] if isinstance(read, tuple) else read))


def lora_numbers(located: Located | None) -> int:
    """How many numbers the LoRAs of an expert have, by the headers of their files."""
    files = [Path(lora.path) for lora in located.spec.loras] if located else []
    headers = [read_header(file) for file in files if file.suffix == ".safetensors"]
    return sum(prod(entry["shape"]) for header in headers for key, entry in header.items() if "alpha" not in key)


def fuse(module: Model) -> Model:
    """Add the LoRAs that are on into a model's own weights, in place, and leave plain layers behind."""
    for name, layer in list(tuner_layers(module)):
        if not layer.merged and not layer.disable_adapters:
            layer.merge()
        module.set_submodule(name, layer.get_base_layer())
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        module.__dict__.pop(mark, None)
    return module


def fused(module: Model) -> Model:
    """A model as it computes, without LoRAs beside its weights: itself if it has none, else a copy with weights of its own."""
    return fuse(copy.deepcopy(module)) if any(tuner_layers(module)) else module
