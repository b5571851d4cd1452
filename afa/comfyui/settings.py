"""The options of `afa comfyui`. No heavy imports: the command line's help comes from here."""

from dataclasses import dataclass

from afa.settings import CheckedOptions, option


@dataclass(frozen=True, kw_only=True)
class ComfyuiSettings(CheckedOptions):
    """The settings of `afa comfyui`: where ComfyUI is."""

    install: str = option(help="ComfyUI's folder, the one with main.py and custom_nodes")
