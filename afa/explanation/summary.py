"""Summaries over several explained images: estimates with their intervals."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from afa.evaluation.results import versions
from afa.explanation.causes import Unused
from afa.explanation.explanation import ExplainedImage
from afa.explanation.shares import as_data, estimates
from afa.stats import Estimate, estimate
from afa.training.measure import BANDS


@dataclass(frozen=True)
class WordMean:
    """The effect of a word, over all prompts that contain it.

    word:    in lower case
    omitted: share of the weight that moves when the word is removed from the prompt
    hidden:  the same when it is hidden from the aggregators; None if they read no text
    looked:  share of the attention that goes to it; None if there is no attention
    pull:    for each expert, weight with the word minus weight without it
    """

    word: str
    omitted: Estimate
    hidden: Estimate | None
    looked: Estimate | None
    pull: list[Estimate]

    def data(self, experts: Sequence[str]) -> dict[str, Any]:
        """Return the JSON values of explain.json."""
        return {
            "word": self.word,
            "omitted": as_data(self.omitted),
            "hidden": as_data(self.hidden),
            "looked": as_data(self.looked),
            "pull": {name: as_data(pull) for name, pull in zip(experts, self.pull, strict=True)},
        }


def word_means(entries: Sequence[ExplainedImage]) -> list[WordMean]:
    """Return the words of all prompts in lower case, the word with the largest effect first.

    A word that is repeated in one prompt counts once, with its mean.
    """
    by_word: dict[str, list[list[dict[str, Any]]]] = {}
    for entry in entries:
        own: dict[str, list[dict[str, Any]]] = {}
        for row in entry.facts["words"]:
            if row["omitted"] is not None:
                own.setdefault(re.sub(r" \(\d+\)$", "", row["word"]).lower(), []).append(row)
        for word, rows in own.items():
            by_word.setdefault(word, []).append(rows)
    found = [_word(word, images) for word, images in by_word.items()]
    return sorted(found, key=lambda one: -one.omitted.value)


def _word(word: str, images: Sequence[Sequence[Mapping[str, Any]]]) -> WordMean:
    """Average one word over the images (outer list) whose prompts contain it."""

    def over(name: str) -> Estimate | None:
        if images[0][0][name] is None:
            return None
        return estimate(np.asarray([np.mean([row[name] for row in rows]) for rows in images]))

    # (images, N)
    pulls = np.asarray([np.mean([row["omitted_pull"] for row in rows], axis=0) for rows in images])
    omitted = over("omitted")
    assert omitted is not None
    return WordMean(word, omitted, over("hidden"), over("looked"), [estimate(column) for column in pulls.T])


def distances(entries: Sequence[ExplainedImage], skipped: Sequence[float]) -> dict[str, Estimate]:
    """Return the RMSE of every counterfactual from the original image, by title, over images.

    skipped: RMSE of each image without unused experts; empty if that was not asked for
    """
    titles = [one["title"] for one in entries[0].facts["counterfactuals"]]
    columns = {
        title: [entry.facts["counterfactuals"][place]["rmse"] for entry in entries]
        for place, title in enumerate(titles)
    }
    if skipped:
        columns["left out where unused"] = list(skipped)
    return {title: estimate(np.asarray(values)) for title, values in columns.items()}


def as_json(
    settings: Mapping[str, Any], entries: Sequence[ExplainedImage], unused: Unused, skipped: Sequence[float]
) -> dict[str, Any]:
    """Return the content of explain.json: everything that was measured."""
    groups = entries[0].facts["shares"]["groups"]
    found = estimates([entry.shares for entry in entries])
    by_group = {
        group: {
            name: [as_data(found[row, band, expert]) for band in range(BANDS)]
            for expert, name in enumerate(unused.experts)
        }
        for row, group in enumerate(groups)
    }
    return {
        "settings": dict(settings),
        "experts": unused.experts,
        "stages": unused.stages,
        "images": [{"stem": entry.stem, **entry.facts} for entry in entries],
        "shares": {
            "bands": f"{BANDS} equal parts of the noise schedule, the first with the least noise",
            "weights": by_group,
        },
        "words": [one.data(unused.experts) for one in word_means(entries)],
        "counterfactuals": {title: as_data(value) for title, value in distances(entries, skipped).items()},
        "unused": unused.data(),
        "versions": versions(),
    }
