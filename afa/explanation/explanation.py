"""One image, explained. Nothing here touches files; the command and the web page both begin here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from afa.baselines.sampler import in_frame
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.explanation.causes import Causes, find_causes
from afa.explanation.counterfactuals import CHANGES, Counterfactual, counterfactuals
from afa.explanation.recording import Recording, record
from afa.explanation.shares import Shares, shares
from afa.generation.sample import Request, Sampling

UNREAD = "no aggregator of this ensemble reads the text (they are averages, have depth 0, or ignore it), so there is no attention to show"


@dataclass(frozen=True)
class Explanation:
    """One image, explained.

    request:         prompt and seed
    recording:       the image, and the weight maps of every pass
    shares:          mean weights by group of stages and band of timesteps
    causes:          what leaving out each word changes; None if no word was left out
    counterfactuals: images with changed weights, in the order of `kinds`
    """

    request: Request
    recording: Recording
    shares: Shares
    causes: Causes | None
    counterfactuals: list[Counterfactual]


@dataclass(frozen=True)
class WordRow:
    """One word of a prompt. Numbers that were not measured are None.

    looked: the share of all looking that goes to it. lean (N,): see Attention. hidden, omitted: what leaving it out moves, from the
    aggregators alone and from the prompt; pull, and the two of them by expert (N,): see Effects.
    """

    word: str
    looked: float | None
    lean: NDArray[np.float64] | None
    hidden: float | None
    hidden_pull: NDArray[np.float64] | None
    omitted: float | None
    omitted_pull: NDArray[np.float64] | None


def explain(
    ensemble: Ensemble,
    request: Request,
    sampling: Sampling,
    kinds: Sequence[str] = (),
    word_steps: int = 4,
    pipeline: Any = None,
) -> Explanation:
    """Generate one image, record its weights, and try what changes it.

    ensemble:   of at least two experts
    request:    prompt and seed
    sampling:   steps and guidance
    kinds:      counterfactuals: off, swapped, pairs, frozen, equal
    word_steps: steps at which each word is left out to see what it changes; 0: none
    pipeline:   of the ensemble; None: a new one
    Returns an Explanation; nothing is written. Raises UserError for an ensemble of one expert.
    """
    check(ensemble)
    pipeline = pipeline or in_frame(ensemble, ensemble.denoiser)
    recording = record(ensemble, request, sampling, pipeline)
    causes = find_causes(pipeline, ensemble.denoiser, recording, word_steps)
    with torch.no_grad():
        others = counterfactuals(pipeline, ensemble.denoiser, recording, request, sampling, [kind for kind in kinds if kind in CHANGES])
        return Explanation(request, recording, shares(recording, train_timesteps(pipeline)), causes, list(others))


def check(ensemble: Ensemble) -> None:
    """Raises UserError for an ensemble of one expert."""
    if len(ensemble.names) < 2:
        raise UserError(f"the ensemble has one expert, {ensemble.names[0]}, and so no weights to explain; give one of several")


def train_timesteps(pipeline: Any) -> int:
    """Of the noise schedule."""
    return int(pipeline.scheduler.config.num_train_timesteps)


def word_rows(recording: Recording, causes: Causes | None) -> list[WordRow]:
    """The words of a prompt, what moves most first; in the prompt's order if nothing was left out."""
    attention, hidden, omitted = recording.attention, causes and causes.hidden, causes and causes.omitted
    looked, leans = (None, None) if attention is None else (attention.looked, attention.leans)
    rows = [
        WordRow(
            word.text,
            None if looked is None else float(looked[index]),
            None if leans is None else leans[index],
            float(hidden.moved[index]) if hidden else None,
            hidden.pull[index] if hidden else None,
            float(omitted.moved[index]) if omitted else None,
            omitted.pull[index] if omitted else None,
        )
        for index, word in enumerate(recording.words)
    ]
    return sorted(rows, key=lambda row: -(row.omitted or 0.0))


def word_remarks(recording: Recording) -> list[str]:
    """What has to be known about the words: who reads none, what looking goes elsewhere, which were cut off."""
    if recording.attention is None:
        return [f"{UNREAD}."] if recording.words else ["No word was found in the prompt."]
    elsewhere = 1 - float(recording.attention.looked.sum())
    remarks = [f"{elsewhere:.0%} of the looking goes to no word: the start, the end, padding, punctuation."]
    cut = [word.text for word in recording.words if not word.tokens]
    return remarks + ([f"Not seen, as the text is cut before: {', '.join(cut)}."] if cut else [])
