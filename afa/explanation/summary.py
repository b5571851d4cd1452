"""What several explained images say together: numbers with their intervals over images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from afa.evaluation.results import versions
from afa.explanation.causes import Unused
from afa.explanation.explanation import Entry
from afa.explanation.shares import as_data, estimates
from afa.stats import Estimate, estimate
from afa.training.measure import BANDS


@dataclass(frozen=True)
class WordMean:
    """A word over all prompts that have it. omitted, hidden: the weight it moves; pull: by expert, with the word minus without."""

    word: str
    omitted: Estimate
    hidden: Estimate | None
    looked: Estimate | None
    pull: list[Estimate]


def word_means(entries: Sequence[Entry]) -> list[WordMean]:
    """The words of all prompts, in small letters, what moves most first; a word twice in a prompt counts with its mean there."""
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
    def over(name: str) -> Estimate | None:
        if images[0][0][name] is None:
            return None
        return estimate(np.asarray([np.mean([row[name] for row in rows]) for rows in images]))

    pulls = np.asarray(
        [np.mean([row["omitted_pull"] for row in rows], axis=0) for rows in images]
    )  # (images, N)
    omitted = over("omitted")
    assert omitted is not None
    return WordMean(word, omitted, over("hidden"), over("looked"), [estimate(column) for column in pulls.T])


def distances(entries: Sequence[Entry], skipped: Sequence[float]) -> dict[str, Estimate]:
    """RMSE from the image as it is, by title, over images. skipped: of "experts left out where unused", if that was tried."""
    titles = [one["title"] for one in entries[0].facts["counterfactuals"]]
    columns = {
        title: [entry.facts["counterfactuals"][place]["rmse"] for entry in entries]
        for place, title in enumerate(titles)
    }
    if skipped:
        columns["left out where unused"] = list(skipped)
    return {title: estimate(np.asarray(values)) for title, values in columns.items()}


def as_json(
    settings: Mapping[str, Any], entries: Sequence[Entry], unused: Unused, skipped: Sequence[float]
) -> dict[str, Any]:
    """explain.json: everything that was measured."""
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
        "words": [
            {
                "word": one.word,
                "omitted": as_data(one.omitted),
                "hidden": as_data(one.hidden),
                "looked": as_data(one.looked),
                "pull": {name: as_data(pull) for name, pull in zip(unused.experts, one.pull, strict=True)},
            }
            for one in word_means(entries)
        ],
        "counterfactuals": {title: as_data(value) for title, value in distances(entries, skipped).items()},
        "unused": {
            "threshold": unused.threshold,
            "cells": {
                name: unused.cells[:, :, index].astype(int).tolist()
                for index, name in enumerate(unused.experts)
            },
            "counts": dict(zip(unused.experts, unused.counts.tolist(), strict=True)),
            "stage_steps": unused.total,
            "estimated_saving": dict(zip(unused.experts, unused.saved.tolist(), strict=True)),
            "sentences": unused.sentences(),
        },
        "versions": versions(),
    }
