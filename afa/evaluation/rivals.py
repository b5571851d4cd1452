"""The rows that need no training: single experts, sampling-time rivals, and the searched merge."""

import functools

from afa.ensemble import Ensemble
from afa.evaluation.rows import Row
from afa.evaluation.setup import Setup
from afa.generation.sample import Sampler, sample


def sampling_rows(setup: Setup) -> list[Row]:
    return [Row(f"single:{name}", "expert", f"expert {name}", functools.partial(_single, setup, name)) for name in setup.names]


def _single(setup: Setup, name: str, options: dict, run: int) -> Sampler:
    by_name = dict(zip(setup.names, setup.ensemble.experts, strict=True))
    pipe = Ensemble.from_experts([by_name[name]], aggregator="mean").pipeline()
    pipe.set_progress_bar_config(disable=True)
    return functools.partial(sample, pipe.to(setup.device))


def auto_mbw_rows(setup: Setup) -> list[Row]:
    return []
