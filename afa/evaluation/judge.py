"""All metrics of a comparison: checked early, then applied to image sets; results are cached by content."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa.errors import UserError
from afa.evaluation.images import ImageSet
from afa.evaluation.protocols import Protocol
from afa.evaluation.results import MetricNote, SetScore, prompts_of
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.tuning import ScoreOfSet
from afa.files import write_atomically
from afa.fingerprint import digest
from afa.metrics.base import ImageMetric, Picture, SetMetric
from afa.metrics.cache import cached_features
from afa.metrics.registry import METRICS, Resources, make_metric
from afa.metrics.user import UserFrechet, UserScore, load_scorer
from afa.schema import Score
from afa.stats import prompt_draws
from afa.store import kept_json

CHUNK = 256  # pictures in memory at once
Attempt = Callable[[str, bool, Callable[[], Any]], Any]


class Judge:
    """The metrics of a comparison, in order; the first one leads its table.

    folder: of cached results
    """

    def __init__(self, metrics: Sequence[ImageMetric | SetMetric], folder: Path, resamples: int) -> None:
        self.metrics, self.folder, self.resamples = list(metrics), folder, resamples
        self._references: dict[SetMetric, Any] = {}  # what metrics need of the real images
        # Options are chosen by the first metric of images.
        self._leading = next((metric for metric in metrics if isinstance(metric, ImageMetric)), None)

    @classmethod
    def make(
        cls, settings: EvaluateSettings, protocol: Protocol, folder: Path, device: torch.device
    ) -> "Judge":
        """Make the protocol's metrics, or those asked for, and the user's scorer, before any image is made.

        Raises UserError for what is missing.
        """
        weights: dict[str, str] = {}
        for given in settings.metric_weights or []:
            name, equals, place = given.partition("=")
            if not equals or name not in METRICS:
                raise UserError(
                    f"--metric-weights {given} names no metric; write METRIC=PATH with one of "
                    f"{', '.join(METRICS)}"
                )
            weights[name] = place
        names = list(settings.metrics or ([] if settings.scorer else protocol.metrics))
        for name in weights:
            if name not in names:
                raise UserError(
                    f"--metric-weights {name}={weights[name]}: the metric '{name}' is not used here; "
                    f"the metrics are {', '.join(names)}"
                )
        metrics = [
            make_metric(name, Resources(weights.get(name), device, settings.batch_size)) for name in names
        ]
        if settings.scorer is not None:
            own = load_scorer(Path(settings.scorer))  # its score, then its features, if it has any
            metrics = [*(own if protocol.real is not None else own[:1]), *metrics]
        for metric in metrics:
            if isinstance(metric, SetMetric) and metric.needs_reference and protocol.real is None:
                raise UserError(
                    f"metric '{metric.name}' compares with real images, "
                    f"and protocol '{protocol.name}' has none; leave it out"
                )
        if not metrics:
            raise UserError("there is nothing to judge by; give --metrics or --scorer")
        return cls(metrics, folder, settings.resamples)

    def labels(self, metric: ImageMetric | SetMetric) -> dict[str, str]:
        """Return the name of each of a metric's scores in the results: by default its own name.

        If several metrics have a score of that name, a user's score is qualified by its file.
        """
        if not isinstance(metric, (UserScore, UserFrechet)):
            return {name: name for name in metric.names}
        others = {name for one in self.metrics if one is not metric for name in one.names}
        qualified, file = "", metric.path.stem
        if isinstance(metric, UserFrechet):
            scores = [one for one in self.metrics if isinstance(one, UserScore) and one.path == metric.path]
            qualified = "features of " if any(metric.name in one.names for one in scores) else ""
        found = {}
        for name in metric.names:
            label = name if name not in others else f"{qualified}{file}:{name}"
            while label != name and label in (*others, *metric.names):
                label = f"{file}:{label}"
            found[name] = label
        return found

    @property
    def primary(self) -> str:
        """Return the first score of an image; "" if there is none, or a user's scorer was not called yet."""
        labels = (self.labels(metric) for metric in self.metrics if isinstance(metric, ImageMetric))
        return next((label for found in labels for label in found.values()), "")

    @property
    def tuning_score(self) -> ScoreOfSet | None:
        """Return the mean of the primary score over some pictures, higher is better; None without one."""
        metric = self._leading
        if metric is None:
            return None
        sign = 1 if metric.higher_is_better else -1
        return lambda pictures: sign * float(np.mean(next(iter(metric.score(pictures).values()))))

    @property
    def tuning_identity(self) -> str:
        """Return what changes when tuning_score changes: metric, weights, a scorer's file."""
        metric = self._leading
        if metric is None:
            return ""
        return json.dumps([type(metric).__qualname__, metric.identity], sort_keys=True)

    def notes(self) -> dict[str, MetricNote]:
        """Return what each score means; the first score of an image and the first of a set are primary."""
        of_sets = (metric for metric in self.metrics if isinstance(metric, SetMetric))
        leading = {self.primary, next((label for one in of_sets for label in self.labels(one).values()), "")}
        notes = {}
        for metric in self.metrics:
            kind = "image" if isinstance(metric, ImageMetric) else "set"
            for label in self.labels(metric).values():
                notes[label] = MetricNote(kind, metric.higher_is_better, metric.source, label in leading)
        return notes

    def judge(
        self, images: ImageSet, protocol: Protocol, title: str, attempt: Attempt
    ) -> tuple[dict[str, list[float]], dict[str, SetScore]]:
        """Score an image set by all metrics; a metric that fails does not stop the others.

        Returns the scores of every image and those of the whole set, both by name.
        """
        scores: dict[str, list[float]] = {}
        sets: dict[str, SetScore] = {}
        for metric in self.metrics:
            what = f"{next(iter(self.labels(metric).values()), 'the scorer')} of {title}"
            score = self._score if isinstance(metric, ImageMetric) else self._set_score
            found = attempt(what, False, lambda score=score, metric=metric: score(metric, images, protocol))
            labels = self.labels(metric)  # a user's scorer has names once it has been called
            named = {labels[name]: value for name, value in (found or {}).items()}
            (scores if isinstance(metric, ImageMetric) else sets).update(named)
        return scores, sets

    def _score(self, metric: ImageMetric, images: ImageSet, protocol: Protocol) -> dict[str, list[float]]:
        """Return the values of all images, or of the first ones if the protocol limits the metric."""
        first = {} if isinstance(metric, UserScore) else protocol.first  # which is about metrics of ours
        count = min([len(images.items), *(first[name] for name in metric.names if name in first)])
        facts = [type(metric).__qualname__, metric.identity, images.digest()]
        file = self.folder / "scores" / f"{digest(facts)[:32]}.{count}.json"
        scores: dict[str, list[float]] = kept_json(file, dict[str, list[Score]]) or {}
        if not scores:
            prompts = prompts_of(images.items)[:count]
            for indices in _by_prompt(prompts):
                pictures = []
                for index in indices:
                    reference = None if protocol.references is None else protocol.references[index]()
                    caption = images.items[index].caption
                    pictures.append(Picture(images.read(index), caption, prompts[index], reference))
                for name, column in metric.score(pictures).items():
                    row = scores.setdefault(name, [float("nan")] * count)
                    for index, value in zip(indices, column, strict=True):
                        row[index] = float(value)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(scores))
        metric.names = metric.names or tuple(scores)  # of a user's scorer that had nothing new to look at
        return scores

    def _set_score(self, metric: SetMetric, images: ImageSet, protocol: Protocol) -> dict[str, SetScore]:
        """Return the value of all images, and under resampled prompts, which are the same for all methods."""
        folder = self.folder / "features"
        if metric.needs_reference and metric not in self._references:
            assert protocol.real is not None
            real = cached_features(metric, protocol.real.images, folder, protocol.real.identity)
            self._references[metric] = metric.prepare(real)
        reference = self._references.get(metric)
        features = cached_features(metric, images.read_all, folder, images.digest())
        groups = np.asarray(prompts_of(images.items))
        draws = prompt_draws(int(groups.max()) + 1, self.resamples)
        replicates = metric.replicates(features, groups, reference, draws)
        value = metric.value(features, reference)
        return {metric.name: SetScore(value, [float(one) for one in replicates], len(features))}


def _by_prompt(prompts: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of images in parts of whole prompts, about CHUNK at once.

    prompts: of each image
    """
    part: list[int] = []
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        if len(part) >= CHUNK and prompts[index] != prompts[part[-1]]:
            yield part
            part = []
        part.append(index)
    yield part
