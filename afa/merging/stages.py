"""Which stage the keys "part.name" of a pipeline belong to: those of its denoiser to its family's, all others to `base`."""

from collections.abc import Iterable

from torch import nn

from afa.errors import UserError
from afa.models import registry as names
from afa.models.registry import FAMILIES

BASE = "base"
DENOISERS = tuple(dict.fromkeys(family.component for family in FAMILIES.values()))  # what pipelines call them


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """A denoiser's stages in the order they run. Raises UserError if no family reads it."""
    try:
        return names.stage_names(model)
    except ValueError as error:
        raise UserError(str(error)) from None


def key_stages(keys: Iterable[str], denoiser: nn.Module) -> dict[str, str]:
    """The stage of every key. denoiser: the pipeline's. Raises UserError if no family reads it."""
    keys = list(keys)
    own = {key: key.partition(".")[2] for key in keys if key.partition(".")[0] in DENOISERS}
    try:
        stages = names.stages_of(own.values(), denoiser)
    except ValueError as error:
        raise UserError(str(error)) from None
    return {key: stages[own[key]] if key in own else BASE for key in keys}
