"""Every point that was evaluated, a line each, on disk before the next is begun: a search resumes, and loses nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from afa.merging.search.space import Weights, key

Scores = list[float]  # one an image
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
    """All whole lines; one that a crash tore is evaluated again."""
    points = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found = json.loads(line)
            points.append(({place: tuple(row) for place, row in found["weights"].items()}, found["scores"]))
        except (ValueError, KeyError, AttributeError):
            continue
    return points
