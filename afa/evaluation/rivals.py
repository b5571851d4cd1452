"""The rows that need no training: single experts, what combines their predictions while sampling, and the searched merge."""

import functools
import itertools
from collections.abc import Callable

from afa.baselines.table import make_sampler
from afa.evaluation.merges import shares
from afa.evaluation.rows import Options, Row
from afa.evaluation.setup import Setup
from afa.generation.sample import Sampler

TITLES = {
    "random_expert": "random expert",
    "noise_average": "noise average",
    "feature_mean": "feature mean (untrained)",
    "timestep_experts": "timestep experts",
    "magicfusion": "MagicFusion",
    "superdiff_or": "SuperDiff OR",
    "superdiff_and": "SuperDiff AND",
}
ORDERS = 6  # of experts over the timesteps, at most


def sampling_rows(setup: Setup) -> list[Row]:
    """Every expert alone, in its own frame and in the ensemble's; then one row a method."""
    alone = [
        Row(f"{kind}:{name}", group, f"{title} {name}{where}", functools.partial(_sampler, setup, kind), ({"expert": name},))
        for kind, group, title, where in (("single", "expert", "expert", ""), ("single_in_ensemble", "expert", "expert", " in the frame"))
        for name in setup.names
    ]
    return alone + [Row(name, "sampling", title, functools.partial(_sampler, setup, name), _candidates(name, setup)) for name, title in TITLES.items()]


def _sampler(setup: Setup, name: str, options: Options, run: int) -> Sampler:
    return make_sampler(name, setup.ensemble, **options)


def _candidates(name: str, setup: Setup) -> tuple[Options, ...]:
    """Options to choose among on the tuning images; the first is the method's default."""
    makers: dict[str, Callable[[], list[Options]]] = {
        "noise_average": lambda: [{"weights": weights} for weights in shares(len(setup.names))],
        "timestep_experts": lambda: [{"table": table} for table in _tables(setup)],
        "magicfusion": lambda: [
            {"general": general, "mode": mode, "t0": t0} for general in setup.ranking for mode, t0 in ((1, 850.0), (2, 600.0))
        ],
        "superdiff_or": lambda: [{"temperature": temperature} for temperature in (1.0, 0.1, 0.0)],
    }
    return tuple(makers[name]()) if name in makers else ({},)


def _tables(setup: Setup) -> list[str]:
    """Equal intervals of the timesteps, in the orders of the experts."""
    edges = [round(1000 * (1 - place / len(setup.names))) for place in range(len(setup.names) + 1)]
    orders = itertools.islice(itertools.permutations(setup.names), ORDERS)
    intervals = list(itertools.pairwise(edges))
    return [",".join(f"{top}-{bottom}:{name}" for name, (top, bottom) in zip(order, intervals, strict=True)) for order in orders]


def auto_mbw_rows(setup: Setup) -> list[Row]:
    return []
