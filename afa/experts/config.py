"""The config of an expert's denoiser, without its weights: what decides how its pipeline is called."""

from typing import Any

import torch

from afa.errors import UserError
from afa.experts.locate import Located
from afa.experts.original import config_of
from afa.experts.parts import check_config, first_line
from afa.families.table import FAMILIES


def denoiser_config(located: Located, family: str, config: str | None = None) -> Any:
    """With the defaults of its class. config: of a single file, as in load_expert. Raises UserError where there is none to be read."""
    import diffusers

    folder = config_of(located, config)[1] if located.single_file else located.path
    folder = folder / FAMILIES[family].component if located.single_file or located.whole_pipeline else folder
    maker: Any = getattr(diffusers, FAMILIES[family].model)
    settings = check_config(folder, "diffusers", FAMILIES[family].model)
    try:
        with torch.device("meta"):
            return maker.from_config(settings).config
    except Exception as error:  # the library raises anything for settings of a wrong type
        raise UserError(f"{folder} has no config of a {FAMILIES[family].model}: {first_line(error)}") from None
