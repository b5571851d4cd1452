"""All metrics of a comparison: checked early, then applied to image sets; results are cached by content."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa.errors import UserError
from afa.evaluation.images import ImageSet
from afa.evaluation.protocols import Protocol
from afa.evaluation.results import MetricNote, SetScore, prompts_of
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.tuning import Score
from afa.files import json_or_none, write_atomically
from afa.metrics.base import ImageMetric, Picture, SetMetric
from afa.metrics.cache import cached_features
from afa.metrics.registry import METRICS, Resources, make_metric
from afa.metrics.user import UserFrechet, UserScore, load_scorer

CHUNK = 256  # pictures in memory at once
Attempt = Callable[[str, bool, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Judged:
    """The scores of one image set by all metrics."""

    scores: dict[str, list[float]]
    sets: dict[str, SetScore]


class Judge:
    """The metrics of a comparison, in order; the first one leads its table.

    folder: of cached results
    """

    def __init__(self, metrics: Sequence[ImageMetric | SetMetric], folder: Path, resamples: int) -> None:
        self.metrics, self.folder, self.resamples = list(metrics), folder, resamples

    @classmethod
    def make(
        cls, settings: EvaluateSettings, protocol: Protocol, folder: Path, device: torch.device
    ) -> "Judge":
        """Make the protocol's metrics, or those asked for, and the user's scorer, before any image is made.

        Raises UserError for what is missing.
        """
        weights = dict(_given(place) for place in settings.metric_weights or [])
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
            own = load_scorer(Path(settings.scorer))
            metrics = [
                *(metric for metric in own if isinstance(metric, ImageMetric) or protocol.real is not None),
                *metrics,
            ]
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
        names = _names(metric)
        if not isinstance(metric, (UserScore, UserFrechet)):
            return {name: name for name in names}
        others = {name for one in self.metrics if one is not metric for name in _names(one)}
        qualified = (
            "features of "
            if isinstance(metric, UserFrechet) and metric.path in _scored(self.metrics, metric.name)
            else ""
        )
        found = {}
        for name in names:
            label = name if name not in others else f"{qualified}{metric.path.stem}:{name}"
            while label != name and label in (*others, *names):
                label = f"{metric.path.stem}:{label}"
            found[name] = label
        return found

    @property
    def primary(self) -> str:
        """Return the first score of an image.

        Returns "" if all metrics are of sets, or a user's scorer was not called yet.
        """
        return next(
            (
                label
                for metric in self.metrics
                if isinstance(metric, ImageMetric)
                for label in self.labels(metric).values()
            ),
            "",
        )

    @property
    def tuning_score(self) -> Score | None:
        """Return the mean of the primary score over some pictures, higher is better;

        None if all metrics are of sets.
        """
        metric = next((metric for metric in self.metrics if isinstance(metric, ImageMetric)), None)
        if metric is None:
            return None
        sign = 1 if metric.higher_is_better else -1
        return lambda pictures: sign * float(np.mean(next(iter(metric.score(pictures).values()))))

    @property
    def tuning_identity(self) -> str:
        """Return what changes when tuning_score changes: metric, weights, a scorer's file."""
        metric = next((metric for metric in self.metrics if isinstance(metric, ImageMetric)), None)
        return (
            "" if metric is None else json.dumps([type(metric).__qualname__, metric.identity], sort_keys=True)
        )

    def notes(self) -> dict[str, MetricNote]:
        """Return what each score means; the first score of an image and the first of a set are primary."""
        of_sets = (
            label
            for metric in self.metrics
            if isinstance(metric, SetMetric)
            for label in self.labels(metric).values()
        )
        leading = {self.primary, next(of_sets, "")}
        notes = {}
        for metric in self.metrics:
            kind = "image" if isinstance(metric, ImageMetric) else "set"
            labels = self.labels(metric).values()
            notes |= {
                label: MetricNote(kind, metric.higher_is_better, metric.source, label in leading)
                for label in labels
            }
        return notes

    def judge(self, images: ImageSet, protocol: Protocol, title: str, attempt: Attempt) -> Judged:
        """Score an image set by all metrics; a metric that fails does not stop the others."""
        judged = Judged({}, {})
        for metric in self.metrics:
            what = f"{next(iter(self.labels(metric).values()), 'the scorer')} of {title}"
            if isinstance(metric, ImageMetric):
                scores = (
                    attempt(what, False, lambda metric=metric: self._score(metric, images, protocol)) or {}
                )
                labels = self.labels(metric)
                judged.scores.update({labels[name]: values for name, values in scores.items()})
            else:
                value = attempt(what, False, lambda metric=metric: self._set_score(metric, images, protocol))
                judged.sets.update({} if value is None else {self.labels(metric)[metric.name]: value})
        return judged

    def _score(self, metric: ImageMetric, images: ImageSet, protocol: Protocol) -> dict[str, list[float]]:
        """Return the values of all images, or of the first ones if the protocol limits the metric."""
        first = {} if isinstance(metric, UserScore) else protocol.first  # which is about metrics of ours
        count = min([len(images.items), *(first[name] for name in metric.names if name in first)])
        file = self._file(metric, images.digest(), f"{count}.json")
        scores = _kept(file)
        if scores is None:
            prompts = prompts_of(images.items)[:count]
            found: dict[str, list[float]] = {}
            for indices in _by_prompt(prompts):
                values = metric.score(
                    [self._picture(images, index, prompts[index], protocol) for index in indices]
                )
                for name, column in values.items():
                    row = found.setdefault(name, [float("nan")] * count)
                    for index, value in zip(indices, column, strict=True):
                        row[index] = float(value)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(found))
            scores = found
        metric.names = metric.names or tuple(scores)  # of a user's scorer that had nothing new to look at
        return scores

    def _picture(self, images: ImageSet, index: int, prompt: int, protocol: Protocol) -> Picture:
        item = images.items[index]
        reference = None if protocol.references is None else protocol.references[index]()
        return Picture(images.read(index), item.caption, prompt, reference)

    def _set_score(self, metric: SetMetric, images: ImageSet, protocol: Protocol) -> SetScore:
        """Return the value of all images, and under resampled prompts, which are the same for all methods."""
        reference = self._reference(metric, protocol) if metric.needs_reference else None
        features = cached_features(metric, images.read_all, self.folder / "features", images.digest())
        groups = np.asarray(prompts_of(images.items))
        count = int(groups.max()) + 1
        draws = np.random.default_rng(0).integers(count, size=(self.resamples, count))
        replicates = metric.replicates(features, groups, reference, draws)
        return SetScore(
            metric.value(features, reference), [float(value) for value in replicates], len(features)
        )

    @cached_property
    def _prepared(self) -> dict[SetMetric, Any]:
        return {}

    def _reference(self, metric: SetMetric, protocol: Protocol) -> Any:
        """Return what a metric needs of the real images; computed once."""
        assert protocol.real is not None
        if metric not in self._prepared:
            real = cached_features(
                metric, protocol.real.images, self.folder / "features", protocol.real.identity
            )
            self._prepared[metric] = metric.prepare(real)
        return self._prepared[metric]

    def _file(self, metric: ImageMetric, digest: str, ending: str) -> Path:
        """Return the cache file of a metric's scores of an image set."""
        facts = json.dumps([type(metric).__qualname__, metric.identity, digest], sort_keys=True)
        return self.folder / "scores" / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.{ending}"


def _kept(file: Path) -> dict[str, list[float]] | None:
    """Return cached scores; None if there are none, or the file is damaged."""
    found = json_or_none(file)
    if not isinstance(found, dict) or not found:
        return None
    columns = [
        isinstance(column, list) and all(isinstance(value, int | float) for value in column)
        for column in found.values()
    ]
    return found if all(columns) else None


def _names(metric: ImageMetric | SetMetric) -> tuple[str, ...]:
    return metric.names if isinstance(metric, ImageMetric) else (metric.name,)


def _scored(metrics: Sequence[ImageMetric | SetMetric], name: str) -> list[Path]:
    """Return the users' scorers with a score of that name."""
    return [metric.path for metric in metrics if isinstance(metric, UserScore) and name in metric.names]


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


def _given(place: str) -> tuple[str, str]:
    """Split METRIC=PLACE. Raises UserError if there is no name."""
    name, equals, where = place.partition("=")
    if not equals or name not in METRICS:
        raise UserError(
            f"--metric-weights {place} names no metric; write METRIC=PATH with one of {', '.join(METRICS)}"
        )
    return name, where
