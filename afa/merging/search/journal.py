"""Every point that was evaluated, a line each, on disk before the next is begun: a search resumes, and loses nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from afa.errors import UserError
from afa.merging.search.space import Weights, key
from afa.schema import Score, build
from afa.text_files import parse_json, read_text, split_lines

Scores = list[float]  # one an image


class Point(TypedDict):
    """A line of the journal: the weights of every expert at a stage, and a score an image."""

    weights: dict[str, tuple[float, ...]]
    scores: list[Score]


Objective = Callable[[Weights], Scores]


class Journal:
    """Evaluates points once. file: JSON lines; None keeps them in memory only."""

    def __init__(self, file: Path | None, objective: Objective) -> None:
        self.file, self.objective = file, objective
        self.points: list[tuple[Weights, Scores]] = _read(file) if file is not None else []
        self._known = {key(weights): scores for weights, scores in self.points}

    def __call__(self, weights: Weights) -> Scores:
        """The scores of a point, computed if it is new."""
        name = key(weights)
        if name not in self._known:
            scores = [float(value) for value in self.objective(weights)]
            self._known[name] = scores
            self.points.append((weights, scores))
            self._append(weights, scores)
        return self._known[name]

    def _append(self, weights: Weights, scores: Scores) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torn = self.file.exists() and not self.file.read_bytes().endswith(b"\n") and self.file.stat().st_size > 0
        with self.file.open("a") as stream:
            stream.write(("\n" if torn else "") + json.dumps({"weights": weights, "scores": scores}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _read(file: Path) -> list[tuple[Weights, Scores]]:
    """All whole lines; one that a crash tore is evaluated again. Raises UserError for a whole one that is no point."""
    points: list[tuple[Weights, Scores]] = []
    for number, line in enumerate(split_lines(read_text(file)) if file.exists() else [], 1):
        where = f"{file}, line {number}"
        try:
            found = parse_json(line, where, nan=True)
        except UserError:
            continue
        point = build(Point, found, where)
        points.append((point["weights"], point["scores"]))
    return points
