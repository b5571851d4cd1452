"""An explanation: computed, saved, read back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.explanation.causes import CHANGES, Causes, Counterfactual, counterfactuals, find_causes
from afa.explanation.recording import Recording, record
from afa.explanation.shares import Shares, shares
from afa.files import json_or_none, read_arrays, replacing, sha256, write_atomically
from afa.sampling.sample import Request, Sampling, in_frame
from afa.schema import Count, Within, build
from afa.text_files import read_json
from afa.training.measure import BANDS

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
        others = counterfactuals(
            pipeline,
            ensemble.denoiser,
            recording,
            request,
            sampling,
            [kind for kind in kinds if kind in CHANGES],
        )
        return Explanation(
            request, recording, shares(recording, train_timesteps(pipeline)), causes, list(others)
        )


def check(ensemble: Ensemble) -> None:
    """Raises UserError for an ensemble of one expert."""
    if len(ensemble.names) < 2:
        raise UserError(
            f"the ensemble has one expert, {ensemble.names[0]}, and so no weights to explain; give one of several"
        )


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


SUFFIXES = (
    "png",
    "sheet.png",
    "strip.webp",
    "npz",
)  # of every image; .words.png and .counterfactuals.png where there is something to show


class GroupShares(TypedDict):
    """groups: of stages. weights: of each group, band and expert; null where a band has no pass."""

    groups: Annotated[list[str], Within(1)]
    weights: list[list[list[float | None]]]


class WordFacts(TypedDict):
    """A row of words: see WordRow."""

    word: str
    looked: float | None
    hidden: float | None
    omitted: float | None
    omitted_pull: list[float] | None


class Distance(TypedDict):
    """How far a counterfactual is from the image."""

    kind: str
    title: str
    rmse: Annotated[float, Within(0, 255)]


class Facts(TypedDict):
    """What the page and explain.json take from an image's .json."""

    prompt: str
    seed: Count
    shares: GroupShares
    words: list[WordFacts]
    word_remarks: list[str]
    counterfactuals: list[Distance]


@dataclass(frozen=True)
class Entry:
    """One explained image, as its .json and .npz say. facts: the .json. means, most (passes, K, N); timesteps (passes,)."""

    stem: str
    facts: dict[str, Any]
    means: NDArray[np.float32]
    most: NDArray[np.float32]
    timesteps: tuple[float, ...]

    @property
    def shares(self) -> NDArray[np.float64]:
        """(G, BANDS, N); nan: a band without a pass."""
        return np.asarray(self.facts["shares"]["weights"], np.float64)


def stem_of(index: int) -> str:
    """The name of an image's files."""
    return f"{index:05d}"


def explained(folder: Path, stem: str) -> bool:
    """Whether everything of an image is there; as it was written; its .json comes last and has the hashes of all others."""
    facts = json_or_none(folder / f"{stem}.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        return False
    return all(
        isinstance(name, str) and (folder / name).is_file() and sha256(folder / name) == found
        for name, found in facts["files"].items()
    )


def write_arrays(recording: Recording, path: Path) -> None:
    """STAGE -> (passes, N, h, w) float16; attention.STAGE -> (U, h, w); timesteps, experts, words, means, most."""
    arrays: dict[str, Any] = {stage: maps.numpy() for stage, maps in recording.maps.items()}
    if recording.attention is not None:
        arrays |= {
            f"attention.{stage}": maps.astype(np.float16) for stage, maps in recording.attention.maps.items()
        }
    names = {
        "experts": np.asarray(recording.experts),
        "words": np.asarray([word.text for word in recording.words]),
    }
    numbers = {
        "timesteps": np.asarray(recording.timesteps, np.float32),
        "means": recording.means,
        "most": recording.most,
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **names, **numbers, **arrays)


def write_facts(folder: Path, stem: str, found: Explanation, files: list[str]) -> None:
    """The .json of one image, after all that it names."""
    facts = {
        "prompt": found.request.prompt,
        "seed": found.request.seed,
        "files": {name: sha256(folder / name) for name in files},
        "shares": {"groups": found.shares.groups, "weights": _rounded(found.shares.weights)},
        "words": [_word(row) for row in word_rows(found.recording, found.causes)],
        "word_remarks": word_remarks(found.recording),
        "passes_made_again": [] if found.causes is None else found.causes.passes,
        "counterfactuals": [
            {"kind": one.kind, "title": one.title, "rmse": round(one.rmse, 4)}
            for one in found.counterfactuals
        ],
    }
    write_atomically(folder / f"{stem}.json", json.dumps(facts, indent=1, ensure_ascii=False))


def read_entry(folder: Path, stem: str) -> Entry:
    """One image's numbers. Raises UserError for files that do not hold what was measured here."""
    file, arrays = folder / f"{stem}.json", read_arrays(folder / f"{stem}.npz")
    try:
        facts = build(Facts, read_json(file), file)
        means, most, timesteps = _numbers(arrays or {}, folder / f"{stem}.npz")
        _check_shape(facts, means.shape[2], file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}; run the command again") from None
    except UserError as error:
        raise UserError(f"{error}; delete {file.name}, and the image is explained again") from None
    return Entry(stem, facts, means, most, tuple(float(time) for time in timesteps))


def _numbers(arrays: dict[str, Any], file: Path) -> list[NDArray[np.float32]]:
    """means, most and timesteps as Entry has them. Raises UserError for others."""
    found = [arrays.get(name) for name in ("means", "most", "timesteps")]
    if any(
        array is None or array.dtype.kind != "f" or not array.size or not np.isfinite(array).all()
        for array in found
    ):
        raise UserError(f"{file} does not hold the finite numbers means, most and timesteps")
    means, most, timesteps = (np.asarray(array) for array in found)
    if means.ndim != 3 or most.shape != means.shape or timesteps.shape != means.shape[:1]:
        raise UserError(
            f"{file}: means {means.shape}, most {most.shape} and timesteps {timesteps.shape} are not of the same passes"
        )
    return [means, most, timesteps]


def _check_shape(facts: dict[str, Any], experts: int, file: Path) -> None:
    """Raises UserError where lists are not as long as there are groups, bands and experts."""
    groups, weights = facts["shares"]["groups"], facts["shares"]["weights"]
    if len(weights) != len(groups) or any(
        len(bands) != BANDS or any(len(band) != experts for band in bands) for bands in weights
    ):
        raise UserError(
            f"{file}: shares.weights is not of {len(groups)} groups, {BANDS} bands and {experts} experts"
        )
    for place, row in enumerate(facts["words"]):
        if row["omitted"] is not None and len(row["omitted_pull"] or ()) != experts:
            raise UserError(
                f"{file}: words[{place}].omitted_pull has not one number for each of {experts} experts"
            )


def _word(row: WordRow) -> dict[str, Any]:
    return {
        name: _rounded(value) if isinstance(value, np.ndarray) else value for name, value in vars(row).items()
    }


def _rounded(values: NDArray[np.floating]) -> list[Any]:
    """As JSON has it: nan becomes null."""
    found = np.round(values.astype(np.float64), 5).astype(object)
    found[np.isnan(values.astype(np.float64))] = None
    nested: list[Any] = found.tolist()
    return nested
