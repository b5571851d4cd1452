"""Compute the explanation of one image, save it, and read it back."""

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

UNREAD = (
    "no aggregator of this ensemble reads the text (they are averages, have depth 0, or ignore it),"
    " so there is no attention to show"
)


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image.

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

    word:         its text
    looked:       share of the aggregators' attention that goes to it, from 0 to 1
    lean:         (N,) see Attention
    hidden:       share of the weight that moves when aggregators do not read the word; see Effects.moved
    hidden_pull:  (N,) the same by expert; see Effects.pull
    omitted:      share of the weight that moves when the word is removed from the prompt
    omitted_pull: (N,) the same by expert
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
    """Raise UserError for an ensemble of one expert."""
    if len(ensemble.names) < 2:
        raise UserError(
            f"the ensemble has one expert, {ensemble.names[0]}, and so no weights to explain;"
            " give one of several"
        )


def train_timesteps(pipeline: Any) -> int:
    """Return the number of training timesteps of the noise schedule."""
    return int(pipeline.scheduler.config.num_train_timesteps)


def word_rows(recording: Recording, causes: Causes | None) -> list[WordRow]:
    """Return the words of a prompt, the word with the largest effect first.

    The order is that of the prompt if no word was left out.
    """
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
    """Return remarks on the words: no attention, attention to other tokens, words that were truncated."""
    if recording.attention is None:
        return [f"{UNREAD}."] if recording.words else ["No word was found in the prompt."]
    elsewhere = 1 - float(recording.attention.looked.sum())
    remarks = [f"{elsewhere:.0%} of the looking goes to no word: the start, the end, padding, punctuation."]
    cut = [word.text for word in recording.words if not word.tokens]
    return remarks + ([f"Not seen, as the text is cut before: {', '.join(cut)}."] if cut else [])


# Files of every image; .words.png and .counterfactuals.png are written only if there is something to show.
SUFFIXES = ("png", "sheet.png", "strip.webp", "npz")


class GroupShares(TypedDict):
    """The mean weights in an image's .json.

    groups:  names of the groups of stages (G)
    weights: (G, BANDS, N); null where a band has no pass
    """

    groups: Annotated[list[str], Within(1)]
    weights: list[list[list[float | None]]]


class WordFacts(TypedDict):
    """A word in an image's .json; see WordRow."""

    word: str
    looked: float | None
    hidden: float | None
    omitted: float | None
    omitted_pull: list[float] | None


class Distance(TypedDict):
    """A counterfactual in an image's .json; see Counterfactual."""

    kind: str
    title: str
    rmse: Annotated[float, Within(0, 255)]


class Facts(TypedDict):
    """The fields of an image's .json that the page and explain.json read."""

    prompt: str
    seed: Count
    shares: GroupShares
    words: list[WordFacts]
    word_remarks: list[str]
    counterfactuals: list[Distance]


@dataclass(frozen=True)
class ExplainedImage:
    """One explained image, read from its .json and .npz.

    stem:      the common part of its file names
    facts:     the content of its .json
    means:     (passes, K, N) mean weights over places
    most:      (passes, K, N) see Recording
    timesteps: (passes,)
    """

    stem: str
    facts: dict[str, Any]
    means: NDArray[np.float32]
    most: NDArray[np.float32]
    timesteps: tuple[float, ...]

    @property
    def shares(self) -> NDArray[np.float64]:
        """(G, BANDS, N) mean weights; nan where a band has no pass."""
        return np.asarray(self.facts["shares"]["weights"], np.float64)


def stem_of(index: int) -> str:
    """Return the common part of the file names of an image."""
    return f"{index:05d}"


def explained(folder: Path, stem: str) -> bool:
    """Return whether all files of an image exist and are unchanged.

    The .json is written last and holds the hashes of the other files.
    """
    facts = json_or_none(folder / f"{stem}.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        return False
    return all(
        isinstance(name, str) and (folder / name).is_file() and sha256(folder / name) == found
        for name, found in facts["files"].items()
    )


def write_arrays(recording: Recording, path: Path) -> None:
    """Write an image's .npz.

    STAGE:            (passes, N, h, w) float16 weight maps
    attention.STAGE:  (U, h, w) float16 attention to words
    and timesteps, experts, words, means and most as in Recording.
    """
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
    """Write the .json of one image, after all files that it names."""
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


def read_entry(folder: Path, stem: str) -> ExplainedImage:
    """Read the numbers of one image. Raises UserError for missing, damaged or foreign files."""
    file, arrays = folder / f"{stem}.json", read_arrays(folder / f"{stem}.npz")
    try:
        facts = build(Facts, read_json(file), file)
        means, most, timesteps = _numbers(arrays or {}, folder / f"{stem}.npz")
        _check_shape(facts, means.shape[2], file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}; run the command again") from None
    except UserError as error:
        raise UserError(f"{error}; delete {file.name}, and the image is explained again") from None
    return ExplainedImage(stem, facts, means, most, tuple(float(time) for time in timesteps))


def _numbers(arrays: dict[str, Any], file: Path) -> list[NDArray[np.float32]]:
    """Return means, most and timesteps as in ExplainedImage. Raises UserError for missing or unfit arrays."""
    found = [arrays.get(name) for name in ("means", "most", "timesteps")]
    if any(
        array is None or array.dtype.kind != "f" or not array.size or not np.isfinite(array).all()
        for array in found
    ):
        raise UserError(f"{file} does not hold the finite numbers means, most and timesteps")
    means, most, timesteps = (np.asarray(array) for array in found)
    if means.ndim != 3 or most.shape != means.shape or timesteps.shape != means.shape[:1]:
        raise UserError(
            f"{file}: means {means.shape}, most {most.shape} and timesteps {timesteps.shape}"
            " are not of the same passes"
        )
    return [means, most, timesteps]


def _check_shape(facts: dict[str, Any], experts: int, file: Path) -> None:
    """Raise UserError for lists whose lengths differ from the numbers of groups, bands and experts."""
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
    """Convert to nested lists for JSON; nan becomes None."""
    found = np.round(values.astype(np.float64), 5).astype(object)
    found[np.isnan(values.astype(np.float64))] = None
    nested: list[Any] = found.tolist()
    return nested
