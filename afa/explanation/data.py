"""An explanation as data: one .npz and one .json an image, from which everything else is made again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afa.explanation.explanation import Explanation, WordRow, word_remarks, word_rows
from afa.explanation.recording import Recording
from afa.files import read_json, replacing, sha256, write_atomically

SUFFIXES = ("png", "sheet.png", "strip.webp", "npz")  # of every image; .words.png and .counterfactuals.png where there is something to show


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
    facts = read_json(folder / f"{stem}.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        return False
    return all(isinstance(name, str) and (folder / name).is_file() and sha256(folder / name) == found for name, found in facts["files"].items())


def write_arrays(recording: Recording, path: Path) -> None:
    """STAGE -> (passes, N, h, w) float16; attention.STAGE -> (U, h, w); timesteps, experts, words, means, most."""
    arrays: dict[str, Any] = {stage: maps.numpy() for stage, maps in recording.maps.items()}
    if recording.attention is not None:
        arrays |= {f"attention.{stage}": maps.astype(np.float16) for stage, maps in recording.attention.maps.items()}
    names = {"experts": np.asarray(recording.experts), "words": np.asarray([word.text for word in recording.words])}
    numbers = {"timesteps": np.asarray(recording.timesteps, np.float32), "means": recording.means, "most": recording.most}
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
        "counterfactuals": [{"kind": one.kind, "title": one.title, "rmse": round(one.rmse, 4)} for one in found.counterfactuals],
    }
    write_atomically(folder / f"{stem}.json", json.dumps(facts, indent=1, ensure_ascii=False))


def read_entry(folder: Path, stem: str) -> Entry:
    """One image's numbers."""
    facts = json.loads((folder / f"{stem}.json").read_text())
    with np.load(folder / f"{stem}.npz") as arrays:
        return Entry(stem, facts, arrays["means"], arrays["most"], tuple(float(time) for time in arrays["timesteps"]))


def _word(row: WordRow) -> dict[str, Any]:
    return {name: _rounded(value) if isinstance(value, np.ndarray) else value for name, value in vars(row).items()}


def _rounded(values: NDArray[np.floating]) -> list[Any]:
    """As JSON has it: nan becomes null."""
    found = np.round(values.astype(np.float64), 5).astype(object)
    found[np.isnan(values.astype(np.float64))] = None
    nested: list[Any] = found.tolist()
    return nested
