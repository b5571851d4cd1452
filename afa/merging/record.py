"""How a merge was made, as the header of a merged file says it. Nothing depends on time or place.

A merged file may be a stranger's. Its header names inputs, never places: an input is a model of this package,
a commit of the hub, a file or folder of that plain name beside the merged file, or what the user gives for
it; and it must have the recorded sha256.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from afa.errors import UserError
from afa.experts.headers import read_metadata
from afa.files import settled
from afa.schema import Sha256, Within, build
from afa.settings import DTYPES
from afa.text_files import parse_json
from afa.version import __version__

KEY = "afa.merge"  # of a merged file's header
Dtype = Literal["float32", "bfloat16", "float16"]
assert set(DTYPES) == set(Dtype.__args__)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class InputLora:
    """A LoRA as a header has it: the name of its file."""

    source: str
    sha256: Sha256
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Input:
    """An expert, a base or a VAE as a header has it.

    source: demo:NAME, a hub id, or the last part of a path
    commit: of the hub
    sha256: of every file that is read, by its path in the input's folder
    step:   an earlier step, instead of files
    """

    name: str
    source: str | None = None
    commit: str | None = None
    sha256: dict[str, Sha256] = field(default_factory=dict)
    loras: list[InputLora] = field(default_factory=list)
    step: str | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON, without what is empty."""
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {}, [])
        }


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """One step as a header has it, its options complete."""

    method: str
    options: dict[str, int | float | bool | str | list[float] | dict[str, list[float]] | None]
    experts: Annotated[list[Input], Within(1)]
    base: Input | None = None
    vae: Input | Literal["merged"] | None = None
    dtype: Dtype | None = None
    name: str = ""

    def inputs(self) -> Iterator[tuple[str, Input]]:
        """All that it reads, each with its role: expert, base or vae."""
        yield from (("expert", one) for one in self.experts)
        others = {"base": self.base, "vae": self.vae}
        yield from ((role, one) for role, one in others.items() if isinstance(one, Input))


@dataclass(frozen=True, kw_only=True)
class Record(RecordedStep):
    """The last step, and what came before it."""

    afa: str = ""
    steps: list[RecordedStep] = field(default_factory=list)
    config: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None


def read_record(file: Path) -> Record:
    """What the header of a merged file, or of a merged folder's denoiser, says of how it was made.

    Raises UserError.
    """
    folders = [settled(file) / part for part in ("unet", "transformer", "")] if file.is_dir() else []
    files = [folder / "diffusion_pytorch_model.safetensors" for folder in folders] or [file]
    source = next((one for one in files if one.suffix == ".safetensors" and one.is_file()), None)
    if source is None:
        advice = "give a .toml file, or a file or folder that afa merge made"
        raise UserError(f"--recipe {file} is no recipe; {advice}")
    text = read_metadata(source).get(KEY)
    if text is None:
        raise UserError(f"{source} does not say how it was merged ('{KEY}' in its header); give a .toml file")
    where = f"the recipe in the header of {source}"
    record: Record = build(Record, parse_json(text, where), where)
    return record


def check_input(recorded: Input, now: Input, where: str) -> None:
    """Raises UserError, with both hashes, for an input that is not what a recipe was made with."""
    renamed = len(recorded.sha256) == len(now.sha256) == 1  # a file may have another name
    names = dict(zip(recorded.sha256, now.sha256, strict=False)) if renamed else {}
    pairs = [(name, then, now.sha256.get(names.get(name, name))) for name, then in recorded.sha256.items()]
    pairs += [
        (one.source, one.sha256, other.sha256) for one, other in zip(recorded.loras, now.loras, strict=True)
    ]
    for name, then, found in pairs:
        if then != found:
            raise UserError(
                f"{where} was made of '{recorded.name}' with {name} of sha256 {then},"
                f" and it has {found or 'no such file'} now; restore it, or merge anew"
            )
    more = sorted(set(now.sha256) - set(recorded.sha256))
    if more and not renamed:
        raise UserError(f"{where} was made of '{recorded.name}' without {more[0]}; restore it, or merge anew")


def record_text(steps: Sequence[Mapping[str, Any]], config: str | None, prediction_type: str | None) -> str:
    """The record for a header: the same merge gives the same text.

    steps:                   each as plain data, the last one makes the result
    config, prediction_type: that single files were read with
    """
    *earlier, last = steps
    beside = {"steps": earlier, "config": config, "prediction_type": prediction_type}
    found = {"afa": __version__, **last, **{name: value for name, value in beside.items() if value}}
    return json.dumps(found, sort_keys=True, default=list)
