"""A search from its settings: merges made in memory, judged by the images that they draw.

The best is written as best.toml.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from afa.devices import choose_device
from afa.ensemble import Ensemble
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
    bayesian_search,
    best_point,
    coordinate_search,
    groups,
)
from afa.merging.settings import SearchSettings
from afa.metrics.base import ImageMetric
from afa.metrics.judging import image_metric, prompt_scores
from afa.metrics.user import try_scorer
from afa.models.registry import FAMILIES
from afa.prompts import asked_prompts, warn_of_prompts
from afa.sampling.sample import Request, Sampling, image_size, sample
from afa.seeds import nth_seed

BEST, POINTS, RESULT = "best.toml", "journal.jsonl", "search.json"


def search(settings: SearchSettings) -> dict[str, Any]:
    """Search, and leave best.toml (for `afa merge --method mbw --weights`) and search.json in the output.

    Resumes after every merge that was judged. Raises UserError for what cannot be searched, before anything
    is merged.
    """
    how = (settings.metric, settings.metric_weights, settings.scorer, settings.device, settings.batch_size)
    metric = image_metric(*how)  # missing weights fail here
    device = choose_device(settings.device)
    output = Path(settings.output)
    asked = settings.binding() | {
        "prompt": asked_prompts(settings.prompt, settings.prompts),
        "the metric's identity": json.dumps(metric.identity, sort_keys=True),
    }
    with locked(output):
        claim(output, asked, "the search", fingerprint(settings.experts, config=settings.config))
        return _search(settings, metric, device, output)


def _search(
    settings: SearchSettings, metric: ImageMetric, device: torch.device, output: Path
) -> dict[str, Any]:
    experts = load_experts(
        settings.experts, getattr(torch, settings.dtype), settings.config, settings.prediction_type
    )
    for module in (module for expert in experts for module in (expert.model, *expert.text_encoders)):
        module.to(device)
    merge = InMemoryMerge(experts)
    space, names = Space(merge.stages, len(experts)), [expert.name for expert in experts]
    judge = _objective(settings, merge, metric, device)
    with tqdm(total=evaluations(settings, space), desc="merges judged", unit="merge", file=sys.stderr) as bar:

        def judged(weights: Weights) -> Scores:
            scores = judge(weights)
            bar.update()
            bar.set_postfix(score=f"{fmean(scores):.4f}")
            return scores

        journal = Journal(output / POINTS, judged)
        bar.update(len(journal.points))
        best = find(settings, space, journal)
    write_atomically(output / BEST, as_toml(best, names))
    record = {
        "experts": names,
        "search": settings.search,
        "merges": len(journal.points),
        "score": fmean(journal(best)),
        "highest_score": fmean(journal(best_point(journal))),  # higher where the search ends elsewhere
        "first_score": fmean(journal.points[0][1]),
        "weights": best,
    }
    write_atomically(output / RESULT, json.dumps(record, indent=1) + "\n")
    return record


def find(settings: SearchSettings, space: Space, journal: Journal) -> Weights:
    """The best weights by the search that was asked for."""
    if settings.search == "bayesian":
        return bayesian_search(space, journal, trials=settings.trials, seed=settings.seed)
    how = {name: getattr(settings, name) for name in ("passes", "line", "grouping", "means")}
    return coordinate_search(space, journal, **how)


def evaluations(settings: SearchSettings, space: Space) -> int:
    """How many merges a search judges at most."""
    if settings.search == "bayesian":
        return settings.trials
    shares: set[float] = set()
    LINES[settings.line](lambda share: shares.add(share) or 0.0)
    return 1 + settings.passes * len(groups(space, settings.grouping)) * (space.experts - 1) * len(shares)


def _objective(
    settings: SearchSettings, merge: InMemoryMerge, metric: ImageMetric, device: torch.device
) -> Objective:
    """Draw the same images with a merge, and judge each: -> the mean score of every prompt."""
    pipeline = Ensemble.from_experts([merge.expert], aggregator="mean", placement="out").pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    sampling = Sampling(settings.steps, settings.guidance, height=settings.height, width=settings.width)
    try_scorer([metric], *image_size(pipeline, sampling))
    prompts = asked_prompts(settings.prompt, settings.prompts)
    warn_of_prompts(prompts, FAMILIES[merge.expert.family].interface, merge.expert.tokenizers)
    requests = [
        Request(prompts[index % len(prompts)], nth_seed(settings.seed, index))
        for index in range(settings.images)
    ]
    captions = [request.prompt for request in requests]

    def judge(weights: Weights) -> Scores:
        merge.apply("mbw", weights=weights)  # into the very model that stands in the pipeline
        batches = [
            requests[start : start + settings.batch_size]
            for start in range(0, len(requests), settings.batch_size)
        ]
        images = [image for batch in batches for image in sample(pipeline, batch, sampling)]
        return prompt_scores(metric, images, captions)

    return judge


def as_toml(weights: Weights, names: Sequence[str]) -> str:
    """Weights as `afa merge --method mbw --weights FILE.toml` reads them: one for each expert."""
    lines = [f"{place} = [{', '.join(f'{value:.6g}' for value in row)}]" for place, row in weights.items()]
    return f"# experts: {', '.join(names)}\n" + "\n".join(lines) + "\n"
