"""Choose the options of baselines by the primary score, on images that are never judged."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from afa.errors import UserError
from afa.evaluation.protocols import TUNING_SEED
from afa.evaluation.rows import Options, apart, in_words
from afa.files import write_atomically
from afa.metrics.base import Picture
from afa.sampling.sample import Request, Sampler, Sampling
from afa.schema import Score
from afa.store import kept_json

ScoreOfSet = Callable[[Sequence[Picture]], float]


class ScoringError(UserError):
    """Computing the score failed, although the images were drawn."""


class Tuner:
    """Scores candidates on a few images, and caches the scores.

    folder:   of the cache, for this score and these captions
    captions: of the images; all candidates have the same noise
    score:    of a set of pictures, higher is better
    at:       values of sampling that replace the protocol's, see Chosen.at
    """

    def __init__(
        self,
        folder: Path,
        captions: Sequence[str],
        sampling: Sampling,
        score: ScoreOfSet | None,
        batch_size: int,
        at: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.captions, self.sampling = folder, captions, sampling
        self.score, self.batch_size, self.at = score, batch_size, dict(at or {})

    def tuner_at(self, at: Mapping[str, Any]) -> "Tuner":
        """Return the same with other values of the protocol's sampling. It shares the cache."""
        given = (self.folder, self.captions, self.sampling, self.score, self.batch_size)
        return Tuner(*given, apart(at, self.sampling))

    @property
    def able(self) -> bool:
        """Return whether there is a score to choose by."""
        return self.score is not None and len(self.captions) > 0

    def scores(
        self, name: str, candidates: Sequence[Options], make: Callable[[Options], Sampler]
    ) -> list[float]:
        """Return the score of each candidate. One process computes them; the others wait."""
        state, known = PartialState(), self._known(name)
        todo = [options for options in candidates if self.key(options) not in known]
        what = ", ".join([f"options of {name}", *(in_words(*value) for value in self.at.items())])
        if state.is_main_process:
            for options in tqdm(todo, desc=f"choosing {what}", unit="candidate", disable=not todo):
                known[self.key(options)] = self.judge(make(options))
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._file(name), json.dumps(known, indent=1))
        state.wait_for_everyone()
        known = self._known(name)
        return [known[self.key(options)] for options in candidates]

    def kept(self, name: str, options: Options) -> float | None:
        """Return the score of a candidate that was computed before, else None."""
        return self._known(name).get(self.key(options))

    def best(self, name: str, candidates: Sequence[Options], make: Callable[[Options], Sampler]) -> Options:
        """Return the candidate with the highest score; the first one if there is no score."""
        if len(candidates) == 1 or not self.able:
            return candidates[0]
        scores = self.scores(name, candidates, make)
        return candidates[max(range(len(candidates)), key=lambda index: scores[index])]

    def judge(self, sampler: Sampler) -> float:
        """Return the score of one method on the tuning images."""
        assert self.score is not None
        requests = [Request(caption, TUNING_SEED + index) for index, caption in enumerate(self.captions)]
        pictures: list[Picture] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            made = zip(sampler(batch, replace(self.sampling, **self.at)), batch, strict=True)
            pictures += [
                Picture(image, request.prompt, start + index) for index, (image, request) in enumerate(made)
            ]
        try:
            score = self.score(pictures)
        except UserError as error:
            raise ScoringError(str(error)) from error
        except Exception as error:
            raise ScoringError(f"{type(error).__name__}: {error}") from error
        if not np.isfinite(score):
            raise ScoringError(f"its score is {score}")
        return score

    def key(self, options: Options) -> str:
        """Return what a score is kept by: the options, and the values that replace the protocol's."""
        return json.dumps([options, self.at] if self.at else options, sort_keys=True)

    def _known(self, name: str) -> dict[str, float]:
        return kept_json(self._file(name), dict[str, Score]) or {}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name.replace(':', '-')}.json"
