"""The table of sampling-time methods, and how one becomes a sampler."""

from collections.abc import Callable
from typing import Any

from afa.ensemble import Ensemble
from afa.sampling.average import feature_mean, noise_average, timestep_experts
from afa.sampling.base import random_expert, single, single_in_ensemble
from afa.sampling.magicfusion import magicfusion
from afa.sampling.options import make_options
from afa.sampling.sample import Sampler
from afa.sampling.superdiff import superdiff_and, superdiff_or

# name -> (ensemble, its options) -> sampler; the options are in options.py, under the same names
BASELINES: dict[str, Callable[[Ensemble, Any], Sampler]] = {
    "single": single,
    "single_in_ensemble": single_in_ensemble,
    "random_expert": random_expert,
    "noise_average": noise_average,
    "feature_mean": feature_mean,
    "timestep_experts": timestep_experts,
    "magicfusion": magicfusion,
    "superdiff_or": superdiff_or,
    "superdiff_and": superdiff_and,
}


def make_sampler(name: str, ensemble: Ensemble, **options: Any) -> Sampler:
    """A method as a sampler of images from the ensemble's experts, where they are (see Ensemble.to).

    The ensemble's experts and frame are used, its aggregators are not. options: see afa.sampling.options, or
    `afa generate --help`. Raises UserError for an unknown method, an option of another one, or values that do not fit.
    """
    checked = make_options(name, options)
    return BASELINES[name](ensemble, checked)
