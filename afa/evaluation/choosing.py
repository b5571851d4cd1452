"""Choose a row's options, its own value of each setting that has several, and the points of curves."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from afa.evaluation.rows import Chosen, MethodRow, Options
from afa.evaluation.setup import Setup
from afa.evaluation.tuning import ScoringError, Tuner

Values = Mapping[str, Any]  # of the settings that have several, see Chosen.at


def choose(setup: Setup, tuner: Tuner, row: MethodRow, note: Callable[[str], None]) -> Chosen:
    """Choose a row's options at the start of each axis, then with them its own value of each axis.

    Everything is chosen on the tuning images. Axes are taken one after the other: guidance, then steps. Of
    equal values the start wins, then the smallest.
    note: gets a sentence if a score could not be computed, and defaults are taken
    """
    first = Chosen(row, row.candidates[0], _first(setup, row))
    if row.by_loss and row.train is not None:
        losses = [row.train(options, 0).loss for options in row.candidates]
        first = replace(first, options=row.candidates[int(np.argmin(losses))])
    try:
        if not row.by_loss:
            start = tuner.tuner_at(first.at)
            best = start.best(row.method, row.candidates, lambda options: row.sampler(options, 0))
            first = replace(first, options=best)
        return _at_own_values(setup, tuner, first)
    except ScoringError as error:
        note(f"the choice of options of {row.title}: {error}; its defaults are taken")
        return first


def _first(setup: Setup, row: MethodRow) -> dict[str, Any]:
    return {axis.name: axis.of(row)[0] for axis in setup.axes}


def _at_own_values(setup: Setup, tuner: Tuner, chosen: Chosen) -> Chosen:
    """Return the choice with the best value of each axis, and its score."""
    if not setup.axes or not tuner.able:
        return chosen
    row, options = chosen.row, chosen.options
    if row.train is not None:
        row.train(options, 0)  # by all processes, since one alone scores
    make = functools.cache(lambda: row.sampler(options, 0))

    def score(at: Values) -> float:
        return tuner.tuner_at(at).scores(row.method, [options], lambda _: make())[0]

    for axis in setup.axes:
        scores = {value: score({**chosen.at, axis.name: value}) for value in axis.of(row)}
        best = max(scores, key=scores.__getitem__)
        chosen = replace(chosen, at={**chosen.at, axis.name: best}, score=scores[best])
    return chosen


def to_score(setup: Setup, tuner: Tuner, row: MethodRow) -> Iterator[tuple[Options, Values]]:
    """Yield what choose() scores: options, and values of the axes; some may come twice.

    Where it depends on scores that are not there yet, something is yielded in its place, as often.
    """
    if not tuner.able:
        return
    at = _first(setup, row)
    if len(row.candidates) > 1 and not row.by_loss:
        yield from ((options, at) for options in row.candidates)
    chosen = foretold(setup, tuner, row)
    for axis in setup.axes:
        yield from ((chosen.options, {**at, axis.name: value}) for value in axis.of(row))
        at = {**at, axis.name: chosen.at[axis.name]}


def foretold(setup: Setup, tuner: Tuner, row: MethodRow) -> Chosen:
    """Return what choose() will return, as far as the scores that are kept tell it, without any model."""
    first = Chosen(row, row.candidates[0], _first(setup, row))

    def score(options: Options, at: Values) -> float | None:
        return tuner.tuner_at(at).kept(row.method, options)

    whole = [first]
    if len(row.candidates) > 1 and not row.by_loss and tuner.able:
        scores = [score(options, first.at) for options in row.candidates]
        if None in scores:
            return first
        whole = [replace(first, options=row.candidates[int(np.argmax(np.asarray(scores, float)))])]
    elif row.by_loss:
        whole = [replace(first, options=options) for options in row.candidates]
    for chosen in whole:
        for axis in setup.axes if tuner.able else ():
            tried = {value: score(chosen.options, {**chosen.at, axis.name: value}) for value in axis.of(row)}
            known = {value: found for value, found in tried.items() if found is not None}
            if len(known) < len(tried):
                break
            best = max(known, key=known.__getitem__)
            chosen = replace(chosen, at={**chosen.at, axis.name: best}, score=known[best])
        else:
            return chosen
    return whole[0]


def on_curves(setup: Setup, chosen: Sequence[Chosen], unscored: float = -np.inf) -> list[Chosen]:
    """Return the rows that are drawn at every value: those asked for, else the best of each kind.

    The best has the highest score on the tuning images at its own values; without scores it is the first.
    unscored: taken for the score of rows that have none
    """
    rows = [one for one in chosen if not one.row.axes]
    asked = setup.settings.curves
    if not setup.axes or asked is not None:
        return [one for one in rows if setup.axes and {one.row.method, "all"} & set(asked or [])]
    kinds: dict[str, list[Chosen]] = {}
    for one in rows:
        kinds.setdefault(_kind(one.row), []).append(one)
    kinds.pop("", None)
    return [
        max(several, key=lambda one: unscored if one.score is None else one.score)
        for several in kinds.values()
    ]


def _kind(row: MethodRow) -> str:
    """Return the kind of which one row is on the curves; "" for rows that are not by default."""
    if row.name in ("afa", "prediction_router"):
        return row.name
    if row.group == "expert":
        return "expert" if row.method == "single" else ""
    if row.name == "prompt_router":
        return ""
    return row.group if row.group in ("merge", "sampling", "control") else ""


def points(setup: Setup, curves: Sequence[Chosen]) -> list[Chosen]:
    """Return the other values of each axis, at which rows on curves are drawn.

    Of the other axes they keep their own values.
    """
    return [
        Chosen(one.row, one.options, {**one.at, axis.name: value}, axis.name)
        for one in curves
        for axis in setup.axes
        for value in sorted(axis.of(one.row))
        if value != one.at[axis.name]
    ]
