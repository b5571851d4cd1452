"""A search from its settings: merges made in memory, judged by the images they draw; the best is written as
best.toml."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from afa.devices import choose_device
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.results import Item, prompts_of
from afa.experts.expert import Expert
from afa.experts.load import load_experts
from afa.files import locked, write_atomically
from afa.fingerprint import claim, fingerprint
from afa.merging.memory import InMemoryMerge
from afa.merging.optimisers import (
    LINES,
    Journal,
    Objective,
    Scores,
    Space,
    Weights,
    arithmetic,
    bayesian_search,
    best_point,
    coordinate_search,
    groups,
)
from afa.merging.settings import SearchSettings
from afa.metrics.base import ImageMetric, Picture
from afa.metrics.registry import Resources, make_metric
from afa.metrics.user import load_scorer, try_scorer
from afa.models.registry import FAMILIES
from afa.prompts import asked_prompts, warn_of_prompts
from afa.sampling.sample import Request, Sampling, image_size, sample
from afa.seeds import nth_seed
from afa.stats import prompt_means

BEST, POINTS, RESULT = "best.toml", "journal.jsonl", "search.json"


def search(settings: SearchSettings) -> dict[str, Any]:
    """Search, and leave best.toml (for `afa merge --method mbw --weights`) and search.json in
    settings.output.

    Resumes after every merge that was judged. Raises UserError for what cannot be searched, before anything
    is merged.
    """
    metric = _metric(settings)  # missing weights fail here
    device = choose_device(settings.device)
    output = Path(settings.output)
    prompts, judge = (
        asked_prompts(settings.prompt, settings.prompts),
        json.dumps(metric.identity, sort_keys=True),
    )
    asked = settings.binding() | {"prompt": prompts, "the metric's identity": judge}
    with locked(output):
        claim(output, asked, "the search", fingerprint(settings.experts, config=settings.config))
        return _search(settings, metric, device, output)


def _search(
    settings: SearchSettings, metric: ImageMetric, device: torch.device, output: Path
) -> dict[str, Any]:
    experts = load_experts(
        settings.experts, getattr(torch, settings.dtype), settings.config, settings.prediction_type
    )
    for expert in experts:
        for module in (expert.model, *expert.text_encoders):
            module.to(device)
    merge = InMemoryMerge(experts)
    space = Space(merge.stages, len(experts))
    pipeline, sampling = _pipeline(merge.expert, device), _sampling(settings)
    try_scorer([metric], *image_size(pipeline, sampling))
    objective = _objective(settings, merge, metric, pipeline)
    with tqdm(total=evaluations(settings, space), desc="merges judged", unit="merge", file=sys.stderr) as bar:
        journal = Journal(output / POINTS, _counted(objective, bar))
        bar.update(len(journal.points))
        best = find(settings, space, journal)
    return _finish(output, settings, [expert.name for expert in experts], journal, best)


def find(settings: SearchSettings, space: Space, journal: Journal) -> Weights:
    """The best weights by the search that was asked for.

    The journal's best is never worse than what a crash would leave.
    """
    if settings.search == "bayesian":
        return bayesian_search(space, journal, trials=settings.trials, seed=settings.seed)
    return coordinate_search(
        space,
        journal,
        passes=settings.passes,
        line=settings.line,
        grouping=settings.grouping,
        means=settings.means,
    )


def evaluations(settings: SearchSettings, space: Space) -> int:
    """How many merges a search judges at most."""
    if settings.search == "bayesian":
        return settings.trials
    a_line = {"linear": 11, "binary": 6, "binary_mid": 9}[settings.line]
    assert set(LINES) == {"linear", "binary", "binary_mid"}
    return 1 + settings.passes * len(groups(space, settings.grouping)) * (space.experts - 1) * a_line


def _metric(settings: SearchSettings) -> ImageMetric:
    if settings.scorer is not None:
        own = load_scorer(Path(settings.scorer))[0]
    else:
        own = make_metric(
            settings.metric,
            Resources(settings.metric_weights, choose_device(settings.device), settings.batch_size),
        )
    if not isinstance(own, ImageMetric):
        raise UserError(
            f"--metric {settings.metric} is one value for a set of images; choose one that judges each image"
        )
    return own


def _sampling(settings: SearchSettings) -> Sampling:
    return Sampling(settings.steps, settings.guidance, height=settings.height, width=settings.width)


def _objective(
    settings: SearchSettings, merge: InMemoryMerge, metric: ImageMetric, pipeline: Any
) -> Objective:
    """Draw the same images with a merge, and judge each: the mean score of every prompt, however often it is
    drawn."""
    prompts = asked_prompts(settings.prompt, settings.prompts)
    requests = [
        Request(prompts[index % len(prompts)], nth_seed(settings.seed, index))
        for index in range(settings.images)
    ]
    sampling = _sampling(settings)
    numbers = prompts_of([Item(0, request.prompt, request.seed) for request in requests])
    warn_of_prompts(prompts, FAMILIES[merge.expert.family].call, merge.expert.tokenizers)

    def judge(weights: Weights) -> Scores:
        merge.apply("mbw", weights=weights)  # into the very model that stands in the pipeline
        pictures: list[Picture] = []
        for start in range(0, len(requests), settings.batch_size):
            batch = requests[start : start + settings.batch_size]
            made = zip(sample(pipeline, batch, sampling), batch, strict=True)
            pictures += [
                Picture(image, request.prompt, numbers[start + index])
                for index, (image, request) in enumerate(made)
            ]
        name, scores = next(iter(metric.score(pictures).items()))
        if not np.isfinite(scores).all():
            prompt = requests[int(np.argmin(np.isfinite(scores)))].prompt
            raise UserError(
                f"'{name}' of an image for '{prompt}' is no finite number; nothing can be searched by it"
            )
        sign = 1 if metric.higher_is_better else -1
        return [sign * float(value) for value in prompt_means(scores, numbers)]

    return judge


def _pipeline(expert: Expert, device: torch.device) -> Any:
    pipeline = Ensemble.from_experts([expert], aggregator="mean", placement="out").pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _counted(objective: Objective, bar: Any) -> Objective:
    def judge(weights: Weights) -> Scores:
        scores = objective(weights)
        bar.update()
        bar.set_postfix(score=f"{arithmetic(scores):.4f}")
        return scores

    return judge


def _finish(
    output: Path, settings: SearchSettings, names: Sequence[str], journal: Journal, best: Weights
) -> dict[str, Any]:
    """The weights for `afa merge`, and what was found; the best of all points where the search ends
    elsewhere."""
    write_atomically(output / BEST, as_toml(best, names))
    top = best_point(journal)
    record = {
        "experts": list(names),
        "search": settings.search,
        "merges": len(journal.points),
        "score": arithmetic(journal(best)),
        "highest_score": arithmetic(journal(top)),
        "first_score": arithmetic(journal.points[0][1]),
        "weights": best,
    }
    write_atomically(output / RESULT, json.dumps(record, indent=1) + "\n")
    return record


def as_toml(weights: Weights, names: Sequence[str]) -> str:
    """Weights as `afa merge --method mbw --weights FILE.toml` reads them: one for each expert."""
    lines = [f"{place} = [{', '.join(f'{value:.6g}' for value in row)}]" for place, row in weights.items()]
    return f"# experts: {', '.join(names)}\n" + "\n".join(lines) + "\n"
