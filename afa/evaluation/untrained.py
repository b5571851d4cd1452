"""Rows without training: sampling-time methods and merges."""

import functools
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from afa.ensemble import Ensemble
from afa.evaluation.rows import SEARCH, MethodRow, Options, Trained
from afa.evaluation.setup import Setup
from afa.evaluation.tuning import Tuner
from afa.experts.expert import Expert
from afa.files import write_atomically
from afa.merging.block_weights import curve_weights, has_presets
from afa.merging.memory import InMemoryMerge
from afa.merging.optimisers import Journal, Space, Weights, bayesian_search
from afa.merging.registry import MERGES, find_merge
from afa.merging.search import BEST, POINTS, as_toml
from afa.sampling.registry import SAMPLING_METHODS, make_sampler
from afa.sampling.sample import Sampler, sample


def merge_rows(setup: Setup) -> list[MethodRow]:
    """Return one row for each merge of the registry."""
    stages = [stage["name"] for stage in setup.manifest.stages]
    rows = []
    for name, merge in MERGES.items():
        curves = f", {'presets' if has_presets(stages) else 'ramps'}" if merge.by_stage else ""
        candidates = tuple(merge.candidates(len(setup.names), stages))
        sampler = functools.partial(_merge_sampler, setup, name)
        rows.append(
            MethodRow(name, "merge", f"{merge.title}{curves}", sampler, candidates, based=merge.needs("base"))
        )
    return rows


def _merge_sampler(setup: Setup, name: str, options: Options, run: int) -> Sampler:
    """Return a stock pipeline around the merged model.

    A merge of a certain number takes so many of the best experts; `order` says which of the first two leads.
    """
    options, rule = dict(options), find_merge(name)
    best_first = options.pop("order", "best first") == "best first"
    pair = setup.ranking[:2] if best_first else setup.ranking[1::-1]
    ranked = (*pair, *setup.ranking[2:])
    merge = merger(setup, ranked[: rule.experts] if rule.experts else setup.names, rule.needs("base"))
    if rule.by_stage:
        options = {"weights": curve_weights(options, merge.stages, setup.names, pair)}
    return merged_sampler(setup, merge.apply(name, **options))


@functools.lru_cache(maxsize=1)  # one merged model in memory at a time
def merger(setup: Setup, names: tuple[str, ...], based: bool) -> InMemoryMerge:
    """Return what merges some experts; every merge is written into the same copy."""
    return InMemoryMerge([setup.expert(name) for name in names], setup.base if based else None)


def merged_sampler(setup: Setup, expert: Expert) -> Sampler:
    """Return a stock pipeline around one merged expert, with the comparison's VAE and scheduler."""
    return functools.partial(
        sample, setup.pipeline(Ensemble.from_experts([expert], aggregator="mean", placement="out"))
    )


def sampling_rows(setup: Setup) -> list[MethodRow]:
    """Return one row for each method, or one for every expert if the method is of one expert."""
    rows = []
    for name, method in SAMPLING_METHODS.items():

        def sampler(options: Options, run: int, name: str = name) -> Sampler:
            base = setup.base if SAMPLING_METHODS[name].based else None
            return make_sampler(name, setup.ensemble, base=base, **options)

        if method.each:
            for expert in setup.names:
                title, options = method.title.format(expert), {"expert": expert}
                rows.append(MethodRow(f"{name}:{expert}", "expert", title, sampler, (options,)))
        else:
            candidates = tuple(method.candidates(setup.names, setup.ranking))
            needs = {"based": method.based, "guided": method.needs_guidance, "cost": method.cost}
            rows.append(MethodRow(name, "sampling", method.title, sampler, candidates, **needs))
    return rows


def auto_mbw_rows(setup: Setup, tuner: Tuner) -> list[MethodRow]:
    """Return the row of block weights that are searched for on the tuning images; none without a score."""
    trials = setup.settings.search_trials
    if not tuner.able or trials < 1:
        return []
    search = functools.partial(_search, setup, tuner)

    def sampler(options: Options, run: int) -> Sampler:
        merge = merger(setup, setup.names, False)
        return merged_sampler(setup, merge.apply("mbw", weights=str(_search_folder(setup, tuner) / BEST)))

    note = f"{trials} merges tried by Optuna on {len(tuner.captions)} other images"
    return [MethodRow(SEARCH, "merge", "auto MBW", sampler, train=search, note=note)]


def _search(setup: Setup, tuner: Tuner, options: Options, run: int) -> Trained:
    """Search in one process; merges that were tried before are not tried again."""
    folder, trials = _search_folder(setup, tuner), setup.settings.search_trials
    file = folder / BEST
    if PartialState().is_main_process and not file.exists():
        merge = merger(setup, setup.names, False)
        with tqdm(total=trials, desc="auto MBW: merges judged", unit="merge") as bar:

            def judge(weights: Weights) -> list[float]:
                bar.update()
                return [tuner.judge(merged_sampler(setup, merge.apply("mbw", weights=weights)))]

            space, journal = Space(merge.stages, len(setup.names)), Journal(folder / POINTS, judge)
            best = bayesian_search(space, journal, trials=trials, seed=setup.settings.seed)
        write_atomically(file, as_toml(best, setup.names))
    PartialState().wait_for_everyone()
    return Trained(folder, file, 0, 0, 0.0, float("nan"))


def _search_folder(setup: Setup, tuner: Tuner) -> Path:
    return tuner.folder / f"{SEARCH}-{setup.settings.search_trials}"


def unsearched(setup: Setup, tuner: Tuner) -> int:
    """Return how many merges the search still has to judge."""
    folder, trials = _search_folder(setup, tuner), setup.settings.search_trials
    if (folder / BEST).exists():
        return 0
    return max(0, trials - len(Journal(folder / POINTS, lambda weights: []).points))
