"""A layer whose LoRAs are part of an expert: what pipelines do to LoRAs (scale, switch off, unload) passes them by."""

from collections.abc import Callable, Sequence
from typing import Any


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
        names = None if adapter_names is None else [*self.own, *(name for name in adapter_names if name not in self.own)]
        super().merge(safe_merge, names)  # type: ignore[misc]


_KINDS: dict[type, type] = {}  # peft's class of a layer -> ours


def make_own(layer: Any, names: Sequence[str]) -> None:
    """Make some adapters of a layer of peft's, as far as it has them, part of its expert."""
    layer.own = tuple(name for name in names if name in layer.scaling)
    kind = type(layer)
    layer.__class__ = _KINDS.setdefault(kind, type(f"Own{kind.__name__}", (OwnLayer, kind), {}))
