"""LoRAs in a component that stands for several models, and experts that share one base model.

The pipeline's LoRA methods of such a component act on every model behind it. LoRAs that belong to an expert
(see afa.experts.lora) are separate: pipelines neither list nor change them. Experts that are LoRAs on one
base share the tensors of the base, and each adds its own adapter.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from torch import Tensor, nn

from afa.denoiser.lora_layers import lora_states
from afa.settings import check_number
from afa.stages.original_names import Layers

Model = TypeVar("Model", bound=nn.Module)
Owner = tuple[dict[str, Any], str]  # a module's table of parameters or buffers, and a name in it


def shared_copy(module: Model) -> Model:
    """Copy a module's structure but not its parameters and buffers, which both copies then share."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def applied(module: nn.Module, apply: Callable[[], Any]) -> Any:
    """Run an `_apply` of a module (a move or a cast) and keep shared tensors shared.

    torch casts a shared parameter in place. But it gives each owner of a buffer a new buffer, and each owner
    of a parameter a new one if it cannot change it in place (to or from the meta device, or under the flags
    of torch.__future__).
    """
    shared = [owners for owners in _owners(module).values() if len(owners) > 1]
    result = apply()
    for (table, name), *others in shared:
        for other, its_name in others:
            other[its_name] = table[name]
    return result


def _owners(module: nn.Module) -> dict[int, list[Owner]]:
    """Map the identity of each tensor to all its owners in the module."""
    found: dict[int, list[Owner]] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((table, name))
    return found


def unshare(module: nn.Module, names: Iterable[str]) -> None:
    """Replace parameters, by name, by copies, so that changes do not reach other modules that share them."""
    for name in names:
        place, _, last = name.rpartition(".")
        owner = module.get_submodule(place)
        old = owner._parameters[last]
        if old is not None:
            owner._parameters[last] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)


def base_of(module: nn.Module) -> int:
    """Return a number that is equal for models that share their weights, apart from LoRAs.

    It is the identity of the first parameter. Weights stored in 8 bits are no parameters; biases are.
    """
    return id(next(parameter for name, parameter in module.named_parameters() if "lora_" not in name))


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size in bytes of all tensors together; memory that several share counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


OWN = "own_"  # prefix of the names of LoRAs that are part of an expert


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and layer of every peft layer of a model: the layers that have LoRAs."""
    return (
        (name, layer)
        for name, layer in model.named_modules()
        if hasattr(layer, "merged_adapters") and hasattr(layer, "base_layer")
    )


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters of one LoRA of a model."""
    return [
        parameter
        for path, parameter in model.named_parameters()
        if "lora_" in path and name in path.split(".")
    ]


def loaded(model: Any) -> list[str]:
    """Return the names of LoRAs that a user loaded into a model, without those that are part of it."""
    return [name for name in getattr(model, "peft_config", None) or {} if not name.startswith(OWN)]


def settle(model: Any, name: str) -> None:
    """Freeze a LoRA that was just loaded, and cast it to its model's dtype."""
    dtype = model.dtype  # looked up once: diffusers searches the whole model for it
    for parameter in adapter_parameters(model, name):
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False).eval()


class LoraHost:
    """The methods by which a stock pipeline handles LoRAs of a component."""

    def lora_models(self) -> Sequence[Any]:
        """Return the models behind the component, each once."""
        raise NotImplementedError

    @property
    def peft_config(self) -> dict[str, Any]:
        """LoRA name -> config, over all models. Raises AttributeError if empty, as pipelines expect."""
        found = {name: model.peft_config[name] for model in self.lora_models() for name in loaded(model)}
        if not found:
            raise AttributeError("no LoRA is loaded")
        return found

    def free_name(self) -> str:
        """Return an unused name for a LoRA."""
        taken = {name for model in self.lora_models() for name in loaded(model)}
        return next(
            name for name in (f"default_{count}" for count in range(len(taken) + 1)) if name not in taken
        )

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Enable these LoRAs, and no others, in every model that has LoRAs; pipelines check the names.

        adapter_names: one name or several
        weights:       as in diffusers; None: 1
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for model in self.lora_models():
            if loaded(model):
                activate(model, names, weights)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove LoRAs from all models; a layer without LoRAs becomes the original layer again."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for model in self.lora_models():
            for name in names:
                if name in loaded(model):
                    delete_adapter_layers(model, name)
            _tidy(model)

    def unload_lora(self) -> None:
        """Remove all LoRAs that a user loaded; fused weights stay as they are."""
        self.delete_adapters([name for model in self.lora_models() for name in loaded(model)])

    def enable_lora(self) -> None:
        self._switch(True)

    def disable_lora(self) -> None:
        self._switch(False)

    def _switch(self, enabled: bool) -> None:
        for model in self.lora_models():
            if loaded(model):
                set_adapter_layers(model, enabled=enabled)
                model.requires_grad_(False)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Add LoRAs into the weights; experts no longer share the weights that change.

        lora_scale:    factor on all of them
        safe_fusing:   check for NaN, as in diffusers
        adapter_names: None: those that are enabled. Pipelines call every component, with or without a LoRA of
                       that name
        Raises NotImplementedError for weights that are stored in 8 bits or on the CPU.
        """
        check_weights(lora_scale)
        models = self.lora_models()
        if any(hasattr(module, "kept") for model in models for module in model.modules()):
            raise NotImplementedError(
                "a LoRA cannot be fused into weights that are stored in 8 bits or on the CPU; "
                "leave it beside them"
            )
        owners = Counter(id(parameter) for model in models for parameter in model.parameters())
        for model in models:
            for name, layer in tuner_layers(model):
                chosen = [
                    one
                    for one in adapter_names or layer.active_adapters
                    if one in layer.scaling and one in loaded(model)
                ]
                if chosen:
                    weight = id(layer.base_layer._parameters["weight"])
                    if owners[weight] > 1:
                        unshare(model, [f"{name}.base_layer.{part}" for part in layer.base_layer._parameters])
                        owners[weight] -= 1
                    layer.scale_layer(lora_scale)
                    layer.merge(safe_merge=safe_fusing, adapter_names=chosen)

    def unfuse_lora(self) -> None:
        """Subtract fused LoRAs from the weights again, up to rounding."""
        for model in self.lora_models():
            for _, layer in tuner_layers(model):
                layer.unmerge()


class DenoiserLoras(LoraHost):
    """A denoiser of several experts; a stock pipeline loads a LoRA into every expert."""

    def _original_layers(self, model: Any) -> dict[str, Layers]:
        """Map the publisher's names of one expert's layers to diffusers' layers."""
        raise NotImplementedError

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str = "transformer",
        adapter_name: str | None = None,
        **options: Any,
    ) -> None:
        """Load a LoRA into every expert; after an error, into none.

        pretrained_model_name_or_path_or_dict: its tensors, by key
        prefix:       as in diffusers
        adapter_name: None: an unused name
        options:      network_alphas and metadata, as diffusers passes them
        Raises ValueError for a name that is reserved, UserError for a LoRA that does not fit, and
        NotImplementedError, before anything is loaded, for a file's path and for weights of text encoders:
        only Ensemble.load_lora loads those.
        """
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, dict):
            raise NotImplementedError(
                "a LoRA's file is loaded with ensemble.load_lora(…), or by a pipeline of ensemble.pipeline()"
            )
        if any(key.startswith("text_encoder") for key in given):
            raise NotImplementedError(
                "this LoRA is for text encoders, too; "
                "load it with ensemble.load_lora(…), or by a pipeline of ensemble.pipeline()"
            )
        name = adapter_name or self.free_name()
        if name.startswith(OWN):
            raise ValueError(
                f"adapter_name '{name}' begins with '{OWN}', as the names of experts' own LoRAs do; "
                "choose another"
            )
        # diffusers' keys of the alphas of attention layers also contain the name of the factor
        alphas = {
            re.sub(r"(_lora\.(down|up)\.weight)?\.alpha$", ".alpha", key): torch.tensor(alpha)
            for key, alpha in (options.pop("network_alphas", None) or {}).items()
        }
        config, part = options.pop("metadata", None), prefix or "denoiser"
        try:
            for model in self.lora_models():
                tensors, layers = {**given, **alphas}, self._original_layers
                states = lora_states(tensors, {part: model}, "the LoRA", "the experts", layers, config)
                model.load_lora_adapter(states[part], prefix=None, adapter_name=name, **options)
                settle(model, name)
        except BaseException:
            self.delete_adapters(name)
            raise


def activate(model: Any, names: Sequence[str], weights: Any = None) -> None:
    """Enable some LoRAs of one model of diffusers or transformers, and no others.

    weights: strength of each, or one for all; None: 1
    """
    check_weights(weights)
    if hasattr(model, "set_adapters"):
        model.set_adapters(list(names), weights)
    else:
        several = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        set_weights_and_activate_adapters(
            model, list(names), [1.0 if weight is None else weight for weight in several]
        )
    model.requires_grad_(False)  # peft makes what is on trainable


def check_weights(weights: Any) -> None:
    """Raise UserError for a LoRA weight that is no finite number.

    weights: one number, several, or nested by part and block; None: 1
    """
    if isinstance(weights, (Mapping, list, tuple)):
        for weight in weights.values() if isinstance(weights, Mapping) else weights:
            check_weights(weight)
    elif weights is not None:
        check_number(weights, "the weight of a LoRA is")


def _tidy(model: Any) -> None:
    """Put the original layer back wherever no LoRA is left."""
    for name, layer in list(tuner_layers(model)):
        if not layer.scaling:
            model.set_submodule(name, layer.base_layer)
    if not getattr(model, "peft_config", True):
        del model.peft_config
    if not hasattr(model, "peft_config") and hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False
    model.requires_grad_(False)


@contextmanager
def lora_scaled(models: nn.Module, scale: float) -> Iterator[None]:
    """Inside the context, multiply all loaded LoRAs by scale, but not those that are part of an expert."""
    check_weights(scale)
    layers = [] if scale == 1 else [(layer, dict(layer.scaling)) for _, layer in tuner_layers(models)]
    for layer, _ in layers:
        layer.scale_layer(scale)
    try:
        yield
    finally:
        for layer, before in layers:
            layer.scaling.update(before)  # dividing by scale would lose bits, and cannot undo 0


class OwnLayer:
    """A mixin before a peft layer class: LoRAs that are part of an expert stay enabled at their strength.

    own: names of those LoRAs in the layer
    """

    own: tuple[str, ...]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        others = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_adapter(self._and_own(others), inference_mode)  # type: ignore[misc]

    def _and_own(self, names: Sequence[str]) -> list[str]:
        return [*self.own, *(name for name in names if name not in self.own)]

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter not in self.own:
            super().set_scale(adapter, scale)  # type: ignore[misc]

    def scale_layer(self, scale: float) -> None:
        self._keeping(super().scale_layer, scale)  # type: ignore[misc]

    def unscale_layer(self, scale: float | None = None) -> None:
        self._keeping(super().unscale_layer, scale)  # type: ignore[misc]

    def _keeping(self, change: Callable[[Any], None], scale: Any) -> None:
        scaling: dict[str, float] = self.scaling  # type: ignore[attr-defined]
        before = {name: scaling[name] for name in self.own if name in scaling}
        change(scale)
        self.scaling.update(before)  # type: ignore[attr-defined]

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all other LoRAs."""
        active = self.active_adapters  # type: ignore[attr-defined]
        if enabled:
            self.set_adapter(self.__dict__.pop("switched_off", active))
        else:
            self.__dict__.setdefault("switched_off", list(active))
            self.set_adapter([])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the expert's own LoRAs, too, since a merged layer computes with its weight alone."""
        names = None if adapter_names is None else self._and_own(adapter_names)
        super().merge(safe_merge, names)  # type: ignore[misc]


_KINDS: dict[type, type] = {}  # peft's class of a layer -> ours


def make_own(layer: Any, names: Sequence[str]) -> None:
    """Make some LoRAs of a peft layer part of its expert; names that the layer does not have are ignored."""
    layer.own = tuple(name for name in names if name in layer.scaling)
    kind = type(layer)
    layer.__class__ = _KINDS.setdefault(kind, type(f"Own{kind.__name__}", (OwnLayer, kind), {}))
