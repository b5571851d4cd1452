"""Which stage of a model each of its parameters belongs to: the one that runs the module it lies in."""

from collections.abc import Iterable, Iterator

from torch import nn

from afa.families.table import FAMILIES, family_of


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """A denoiser's stages in the order they run. Raises ValueError if no family reads it."""
    return tuple(stage.name for stage in FAMILIES[family_of(model)].stages(model))


def stages_of(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """The stage of every parameter and buffer of a denoiser: name -> stage.

    names: the model's own, or those that a file holds for it. What no stage runs (what embeds latents, time, text and added
    conditions) belongs to the first, as in block-weighted merging (bbc-mc, sdweb-merge-block-weighted-gui).
    Raises ValueError if no family reads the model.
    """
    walked = FAMILIES[family_of(model)].stages(model)
    places = {id(module): place for place, module in model.named_modules()}
    runs = {places[id(module)]: stage.name for stage in walked for module in stage.modules()}
    return {name: next((runs[place] for place in _around(name) if place in runs), walked[0].name) for name in names}


def _around(name: str) -> Iterator[str]:
    """The places of the modules a parameter lies in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
