"""LoRA experts on one base: the base is held once, each expert adds its own adapter.

LoRAs in a component that stands for several models: what pipelines do to them is done to every model behind it.

LoRAs that are part of an expert (see afa.experts.own) are not among them: they are neither listed nor changed.
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


OWN = "own_"  # begins the names of LoRAs that are part of an expert


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that have LoRAs beside their weight, by name; peft's."""
    return (
        (name, layer)
        for name, layer in model.named_modules()
        if hasattr(layer, "merged_adapters") and hasattr(layer, "base_layer")
    )


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one LoRA in a model."""
    return [
        parameter
        for path, parameter in model.named_parameters()
        if "lora_" in path and name in path.split(".")
    ]


def loaded(model: Any) -> list[str]:
    """The names of LoRAs that were loaded into a model, without those that are part of it."""
    return [name for name in getattr(model, "peft_config", None) or {} if not name.startswith(OWN)]


def settle(model: Any, name: str) -> None:
    """A LoRA that was just loaded is frozen, and computes in its model's dtype."""
    dtype = model.dtype  # diffusers looks through the whole model for it
    for parameter in adapter_parameters(model, name):
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False).eval()


class LoraHost:
    """The methods by which a stock pipeline handles LoRAs of a component."""

    def lora_models(self) -> Sequence[Any]:
        """The models behind the component, each once."""
        raise NotImplementedError

    @property
    def peft_config(self) -> dict[str, Any]:
        """By name, what is loaded into some of the models. AttributeError if nothing is, as pipelines expect."""
        found = {name: model.peft_config[name] for model in self.lora_models() for name in loaded(model)}
        if not found:
            raise AttributeError("no LoRA is loaded")
        return found

    def free_name(self) -> str:
        """A name for a LoRA that was given none."""
        taken = {name for model in self.lora_models() for name in loaded(model)}
        return next(
            name for name in (f"default_{count}" for count in range(len(taken) + 1)) if name not in taken
        )

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Switch on these LoRAs, and no others, wherever they are loaded; pipelines ask every component, and check the names."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for model in self.lora_models():
            if loaded(model):
                activate(model, names, weights)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take LoRAs out again, wherever they are loaded; a layer that has none left is a plain one again."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for model in self.lora_models():
            for name in names:
                if name in loaded(model):
                    delete_adapter_layers(model, name)
            _tidy(model)

    def unload_lora(self) -> None:
        """Take all LoRAs out again that were loaded; weights that one was fused into stay as they are."""
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
        """Add LoRAs (those that are on, or by name) into the weights. What experts shared until then, each has for itself afterwards.

        Pipelines ask every component, whether it has a LoRA of that name or not. Raises NotImplementedError for weights that are
        stored in 8 bits or elsewhere.
        """
        check_weights(lora_scale)
        models = self.lora_models()
        for model in models:
            _check_fusible(model)
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
        """Take fused LoRAs out of the weights again, but for rounding."""
        for model in self.lora_models():
            for _, layer in tuner_layers(model):
                layer.unmerge()


class DenoiserLoras(LoraHost):
    """A denoiser of several experts, into which a stock pipeline loads LoRAs: into every expert the same."""

    def _original_layers(self, model: Any) -> dict[str, Layers]:
        """The publisher's names of one expert's layers."""
        raise NotImplementedError

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str = "transformer",
        adapter_name: str | None = None,
        **options: Any,
    ) -> None:
        """Load a LoRA beside the weights of every expert; all of it, or nothing and a ValueError.

        What a pipeline hands over may also hold weights for text encoders, which only Ensemble.load_lora can place: then
        NotImplementedError, before anything is loaded. options: network_alphas and metadata as diffusers hands them over.
        """
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, dict):
            raise NotImplementedError(
                "a LoRA's file is loaded with ensemble.load_lora(…), or by a pipeline of ensemble.pipeline()"
            )
        if any(key.startswith("text_encoder") for key in given):
            raise NotImplementedError(
                "this LoRA is for text encoders, too; load it with ensemble.load_lora(…), or by a pipeline of ensemble.pipeline()"
            )
        name = adapter_name or self.free_name()
        if name.startswith(OWN):
            raise ValueError(
                f"adapter_name '{name}' begins with '{OWN}', as the names of experts' own LoRAs do; choose another"
            )
        alphas = {
            key: torch.tensor(alpha) for key, alpha in (options.pop("network_alphas", None) or {}).items()
        }
        config, part = options.pop("metadata", None), prefix or "denoiser"
        try:
            for model in self.lora_models():
                states = lora_states(
                    {**given, **_attention(alphas)},
                    {part: model},
                    "the LoRA",
                    "the experts",
                    self._original_layers,
                    config,
                )
                model.load_lora_adapter(states[part], prefix=None, adapter_name=name, **options)
                settle(model, name)
        except BaseException:
            self.delete_adapters(name)
            raise


def _attention(alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Alphas as diffusers hands them over, by their layers' names; its names of attention layers have the factor's, too."""
    return {
        re.sub(r"(_lora\.(down|up)\.weight)?\.alpha$", ".alpha", key): alpha for key, alpha in alphas.items()
    }


def activate(model: Any, names: Sequence[str], weights: Any = None) -> None:
    """Switch on some LoRAs of one model, of diffusers or transformers, each as strongly as its weight says (1 by default)."""
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
    """Raises UserError for a LoRA's weight that is no finite number. weights: one, several, or by part and block; None: 1."""
    if isinstance(weights, (Mapping, list, tuple)):
        for weight in weights.values() if isinstance(weights, Mapping) else weights:
            check_weights(weight)
    elif weights is not None:
        check_number(weights, "the weight of a LoRA is")


def _check_fusible(model: nn.Module) -> None:
    """Raises NotImplementedError where weights are no parameters."""
    if any(hasattr(module, "kept") for module in model.modules()):
        raise NotImplementedError(
            "a LoRA cannot be fused into weights that are stored in 8 bits or on the CPU; leave it beside them"
        )


def _tidy(model: Any) -> None:
    """Put plain layers back where no LoRA is left."""
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
    """Inside, LoRAs that were loaded beside the weights count so much; those that are part of an expert stay as they are."""
    check_weights(scale)
    layers = [] if scale == 1 else [(layer, dict(layer.scaling)) for _, layer in tuner_layers(models)]
    for layer, _ in layers:
        layer.scale_layer(scale)
    try:
        yield
    finally:
        for layer, before in layers:
            layer.scaling.update(before)  # dividing again would lose bits, and cannot undo 0


class OwnLayer:
    """What a layer's class becomes in front of peft's own: LoRAs that are part of an expert stay on, and as strong as they are."""

    own: tuple[str, ...]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        others = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        super().set_adapter([*self.own, *(name for name in others if name not in self.own)], inference_mode)  # type: ignore[misc]

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter not in self.own:
            super().set_scale(adapter, scale)  # type: ignore[misc]

    def scale_layer(self, scale: float) -> None:
        self._keeping(super().scale_layer, scale)  # type: ignore[misc]

    def unscale_layer(self, scale: float | None = None) -> None:
        self._keeping(super().unscale_layer, scale)  # type: ignore[misc]

    def _keeping(self, change: Callable[[Any], None], scale: Any) -> None:
        kept = {name: self.scaling[name] for name in self.own if name in self.scaling}  # type: ignore[attr-defined]
        change(scale)
        self.scaling.update(kept)  # type: ignore[attr-defined]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all others on again, or off."""
        if enabled:
            self.set_adapter(self.__dict__.pop("switched_off", self.active_adapters))  # type: ignore[attr-defined]
        else:
            self.__dict__.setdefault("switched_off", list(self.active_adapters))  # type: ignore[attr-defined]
            self.set_adapter([])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Own ones always with the others: a layer that is merged computes with its weight alone."""
        names = (
            None
            if adapter_names is None
            else [*self.own, *(name for name in adapter_names if name not in self.own)]
        )
        super().merge(safe_merge, names)  # type: ignore[misc]


_KINDS: dict[type, type] = {}  # peft's class of a layer -> ours


def make_own(layer: Any, names: Sequence[str]) -> None:
    """Make some adapters of a layer of peft's, as far as it has them, part of its expert."""
    layer.own = tuple(name for name in names if name in layer.scaling)
    kind = type(layer)
    layer.__class__ = _KINDS.setdefault(kind, type(f"Own{kind.__name__}", (OwnLayer, kind), {}))
