"""Loads LoRAs and textual inversions into a running ensemble, for all experts or some."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from afa.denoiser.lora import OWN, activate, adapter_parameters, check_weights, loaded, shared_copy
from afa.errors import UserError, unknown
from afa.experts.lora import load_lora, lora_parts
from afa.models.registry import FAMILIES
from afa.text_encoder import load_inversion, unload_inversion

if TYPE_CHECKING:
    from afa.ensemble import Ensemble


def load_into(
    ensemble: "Ensemble",
    source: Any,
    experts: Sequence[str] | None,
    name: str | None,
    scale: float,
    options: dict[str, Any],
) -> str:
    """Load a LoRA and return its adapter name. After an error nothing is loaded. See Ensemble.load_lora."""
    check_weights(scale)
    chosen = _chosen(ensemble, experts)
    name = name or ensemble.denoiser.free_name()
    _check_name(ensemble, name)
    models = [ensemble.denoiser.experts[index] for index in chosen]
    try:
        encoders = [_load_one(ensemble, index, source, name, options) for index in chosen]
        _check_text(ensemble, chosen, encoders, name)
    except BaseException:
        ensemble.denoiser.delete_adapters(name)
        raise
    _give(ensemble, chosen, encoders, name)
    for model in (*models, *(encoder for own in encoders for encoder in own)):
        if name in loaded(model):
            activate(model, [name], scale)
    return name


def _chosen(ensemble: "Ensemble", experts: Sequence[str] | None) -> list[int]:
    """Return the indices of some experts, or of all for None. Raises UserError for an unknown name."""
    for name in experts or ():
        if name not in ensemble.names:
            raise UserError(unknown(name, ensemble.names, "expert of this ensemble"))
    return [index for index, name in enumerate(ensemble.names) if experts is None or name in experts]


def _check_name(ensemble: "Ensemble", name: str) -> None:
    """Raise UserError for an adapter name that is in use or not allowed."""
    if name.startswith(OWN) or "." in name:
        raise UserError(
            f"adapter_name '{name}' cannot be used (no dots, and nothing that begins with '{OWN}'); "
            "choose another"
        )
    for host in (ensemble.denoiser, *ensemble.text_encoders):
        if any(name in loaded(model) for model in host.lora_models()):
            raise UserError(
                f"a LoRA called '{name}' is loaded already; choose another adapter_name, "
                f"or take it out with delete_adapters('{name}')"
            )


def _load_one(ensemble: "Ensemble", index: int, source: Any, name: str, options: dict[str, Any]) -> list[Any]:
    """Load a LoRA into one expert's denoiser, and into copies of its text encoders that share their weights.

    Returns the copies.
    """
    import diffusers

    encoders: list[Any] = [
        shared_copy(host.encoders[host.of_expert[index]]) for host in ensemble.text_encoders
    ]
    expert = replace(ensemble.experts[index], model=ensemble.denoiser.experts[index], text_encoders=encoders)
    parts = lora_parts(expert)
    kinds = FAMILIES[expert.family].interface.pipeline_name(len(encoders), expert.model.config)
    switched = getattr(diffusers, kinds)._lora_loadable_modules  # a pipeline cannot disable LoRAs of others
    parts = {part: module for part, module in parts.items() if part in switched}
    load_lora(parts, source, name, f"expert '{expert.name}'", **options)
    return encoders


def _check_text(
    ensemble: "Ensemble", chosen: Sequence[int], encoders: Sequence[Sequence[nn.Module]], name: str
) -> None:
    """Raise UserError if text encoders would differ in a family whose experts must share them."""
    joined = FAMILIES[ensemble.denoiser.family].interface.concat_text
    for slot, host in enumerate(ensemble.text_encoders):
        changed = bool(adapter_parameters(encoders[0][slot], name))
        if changed and not joined and len(chosen) < len(host.of_expert):
            what = (
                f"text encoder {slot + 1}, and experts of family {ensemble.denoiser.family} must have the "
                "same"
            )
            raise UserError(
                f"the LoRA would change {what}; "
                "load it into all experts, or one that changes the denoiser alone"
            )


def _give(ensemble: "Ensemble", chosen: Sequence[int], encoders: Sequence[Sequence[Any]], name: str) -> None:
    """Put the text encoders with the LoRA into the ensemble."""
    for slot, host in enumerate(ensemble.text_encoders):
        changed = {
            index: own[slot]
            for index, own in zip(chosen, encoders, strict=True)
            if adapter_parameters(own[slot], name)
        }
        host.replace(changed)
        for index, expert in enumerate(ensemble.experts):
            expert.text_encoders[slot] = host.encoders[host.of_expert[index]]
    if any(host.joined for host in ensemble.text_encoders):
        for host in ensemble.text_encoders:
            host.joined = True


def equip(ensemble: "Ensemble", pipe: Any) -> None:
    """Replace the methods of a stock pipeline that expect one model in each component."""

    def load_lora_weights(
        source: Any, adapter_name: str | None = None, hotswap: bool = False, **options: Any
    ) -> None:
        if hotswap:
            raise NotImplementedError(
                "hotswap is not supported on an ensemble; delete_adapters(name), then load the other"
            )
        load_into(ensemble, source, None, adapter_name, 1.0, options)

    def fuse_lora(*args: Any, adapter_names: Sequence[str] | None = None, **options: Any) -> None:
        known = [name for names in pipe.get_list_adapters().values() for name in names]
        for name in adapter_names or ():
            if name not in known:
                raise UserError(unknown(name, sorted(set(known)), "LoRA that is loaded"))
        type(pipe).fuse_lora(pipe, *args, adapter_names=adapter_names, **options)

    def load_textual_inversion(
        source: Any, token: Any = None, tokenizer: Any = None, text_encoder: Any = None, **options: Any
    ) -> None:
        load_inversion(pipe, source, token, tokenizer, text_encoder, **options)

    def unload_textual_inversion(tokens: Any = None, tokenizer: Any = None, text_encoder: Any = None) -> None:
        unload_inversion(pipe, tokens, tokenizer, text_encoder)

    for method in (load_lora_weights, fuse_lora, load_textual_inversion, unload_textual_inversion):
        if hasattr(pipe, method.__name__):
            setattr(pipe, method.__name__, method)
