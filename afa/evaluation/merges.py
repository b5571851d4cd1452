"""The rows of static merges: every rule of afa.merging, with the options worth trying."""

import functools
import itertools
from collections.abc import Callable, Sequence

from afa.ensemble import Ensemble
from afa.evaluation.rows import Options, Row
from afa.evaluation.setup import Setup
from afa.experts.load import Expert
from afa.generation.sample import Sampler, sample
from afa.merging.memory import InMemoryMerge
from afa.merging.presets import has_presets, preset_weights
from afa.merging.stages import BASE
from afa.merging.table import PAIRS, needs

TITLES = {
    "weighted": "weighted merge",
    "mbw": "MBW",
    "add_difference": "add difference",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "model_stock": "model stock",
    "slerp": "slerp",
}
SHAPES = ("GRAD_V", "GRAD_A", "WRAP12", "SMOOTHSTEP", "OUT12", "MID12_50")  # of presets, each in both directions
RAMPS = ((0.0, 1.0), (0.25, 0.75))  # the second's share at the first and at the last stage, where there are no presets
SCALES = (0.3, 0.5, 0.7, 1.0)


def merge_rows(setup: Setup) -> list[Row]:
    """One row a rule. Rows that need the base say so when they are run."""
    titles = {**TITLES, "mbw": f"{TITLES['mbw']}, {'presets' if _has_presets(setup) else 'ramps'}"}
    return [
        Row(name, "merge", title, functools.partial(_sampler, setup, name), tuple(_candidates(name, setup)), based=needs(name, "base"))
        for name, title in titles.items()
    ]


def _candidates(name: str, setup: Setup) -> list[Options]:
    """Options to choose among on the tuning images; the first is the method's default."""
    count = len(setup.names)
    makers: dict[str, Callable[[], list[Options]]] = {
        "weighted": lambda: [{"weights": weights} for weights in shares(count)],
        "mbw": lambda: [{**shape, "order": order} for shape in _shapes(setup) for order in ("best first", "second first")],
        "add_difference": lambda: [{"alpha": alpha, "order": order} for alpha in SCALES for order in ("best first", "second first")],
        "task_arithmetic": lambda: [{"scale": scale} for scale in (1 / count, *SCALES)],
        "ties": lambda: [{"scale": scale, "density": density} for density, scale in itertools.product((0.2, 0.5), (1.0, 0.5))],
        "dare": lambda: [{"scale": scale, "drop": drop} for drop, scale in itertools.product((0.5, 0.9), (1 / count, 0.5))],
        "model_stock": lambda: [{}],
        "slerp": lambda: [{"t": t, "order": "best first"} for t in (0.5, 0.3, 0.7)],
    }
    return makers[name]()


def _shapes(setup: Setup) -> list[Options]:
    """How block weights may run from the first stage to the last: as presets do, which are for U-Nets, else straight."""
    return [{"preset": name} for name in SHAPES] if _has_presets(setup) else [{"first": first, "last": last} for first, last in RAMPS]


def _has_presets(setup: Setup) -> bool:
    return has_presets([stage["name"] for stage in setup.manifest.stages])


def shares(count: int) -> list[list[float]]:
    """Equal shares, and one expert ahead of the others."""
    ahead = [[0.6 if place == first else 0.4 / (count - 1) for place in range(count)] for first in range(count)] if count > 1 else []
    return [[1 / count] * count, *ahead]


def _sampler(setup: Setup, name: str, options: Options, run: int) -> Sampler:
    """A stock pipeline around the merged model. `order` says which of the two best experts a merge of pairs begins with."""
    options = dict(options)
    best_first = options.pop("order", "best first") == "best first"
    pair = setup.ranking[:2] if best_first else setup.ranking[1::-1]
    merge = merger(setup, pair if name in PAIRS else setup.names, needs(name, "base"))
    if name == "mbw":
        curve = preset_weights(options["preset"], merge.stages) if "preset" in options else ramp(merge.stages, **options)
        options = {"weights": _of_pair(setup, curve, pair)}
    return merged_sampler(setup, merge.apply(name, **options))


@functools.lru_cache(maxsize=1)  # one merged model in memory at a time
def merger(setup: Setup, names: tuple[str, ...], based: bool) -> InMemoryMerge:
    """Merges of some experts, written into one copy again and again."""
    by_name = dict(zip(setup.names, setup.ensemble.experts, strict=True))
    return InMemoryMerge([by_name[name] for name in names], setup.base if based else None)


def merged_sampler(setup: Setup, expert: Expert) -> Sampler:
    """A stock pipeline around one merged expert, in the comparison's frame."""
    return functools.partial(sample, setup.pipeline(Ensemble.from_experts([expert], aggregator="mean", placement="out")))


def ramp(stages: Sequence[str], first: float, last: float) -> dict[str, float]:
    """A straight line along the stages, from a share at the first to one at the last."""
    steps = max(1, len(stages) - 1)
    return {stage: first + (last - first) * place / steps for place, stage in enumerate(stages)}


def _of_pair(setup: Setup, curve: dict[str, float], pair: tuple[str, ...]) -> dict[str, list[float]]:
    """A curve from the first to the second of a pair, as a weight for every expert."""
    shares = {BASE: 0.5, **curve}
    return {stage: [share * (name == pair[1]) + (1 - share) * (name == pair[0]) for name in setup.names] for stage, share in shares.items()}
