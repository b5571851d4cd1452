"""What a user writes for an expert: NAME=SOURCE@REVISION+LORA*STRENGTH."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from afa.errors import UserError, unknown
from afa.files import given_name
from afa.places import check_name, located, plain_name
from afa.settings import check_number

PREDICTION_TYPES = ("epsilon", "v_prediction")  # what a U-Net may predict
PREDICTION_HELP = "what U-Nets of single files predict, if the files do not record it"  # of --prediction-type
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(/[\w./-]+\.(safetensors|gguf))?")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Lora:
    """A LoRA file that becomes part of an expert.

    path:     of the file
    strength: factor on its change of the weights; 1: as trained
    """

    path: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.strength, f"the strength of LoRA {self.path} is", least=-1000, most=1000)

    def __str__(self) -> str:
        return self.path if self.strength == 1 else f"{self.path}*{self.strength:g}"


@dataclass(frozen=True)
class ExpertSpec:
    """One expert as the user, or a manifest, names it.

    name:            unique in an ensemble
    source:          a diffusers folder, a .safetensors or .gguf file, a hub id org/name or
                     org/name/file.safetensors
    revision:        branch, tag or commit of a hub id; None: the default branch
    loras:           LoRA files that are part of it
    named_by:        the file that names it, such as a manifest; None: the user
    prediction_type: one of PREDICTION_TYPES, from --prediction-type; None: the files say it
    """

    name: str
    source: str
    revision: str | None = None
    loras: tuple[Lora, ...] = field(default=())
    named_by: str | None = None
    prediction_type: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.name}={self.source}{revision}{''.join(f'+{lora}' for lora in self.loras)}"

    @classmethod
    def parse(cls, text: str, prediction_type: str | None = None) -> "ExpertSpec":
        """Read "name=source@revision+lora*strength".

        text:            a path that exists is taken whole, whatever characters it has; demo:MODEL is a model
                         that comes with afa
        prediction_type: of a U-Net in a single file that does not say it
        Raises UserError for a text without source, or a strength that is no number.
        """
        text = located(text)
        name, rest = None, text
        head, equals, tail = text.partition("=")
        named = NAME.fullmatch(head) or exists(tail) or HUB_ID.fullmatch(tail)
        if equals and named and not exists(text):
            name, rest = check_name(head, "an expert"), tail
        pieces = _pieces(rest)
        source, loras = pieces[0], tuple(_lora(piece) for piece in pieces[1:])
        revision = None
        if "@" in source and not exists(source):
            source, _, revision = source.rpartition("@")
        if not source:
            raise UserError(
                f"expert '{text}' has no source; write a folder, a .safetensors file or org/name, "
                "optionally as name=source"
            )
        if prediction_type not in (None, *PREDICTION_TYPES):
            raise UserError(unknown(str(prediction_type), PREDICTION_TYPES, "prediction type"))
        return cls(name or _default_name(source), source, revision, loras, prediction_type=prediction_type)


def exists(place: str) -> bool:
    """Whether a path exists; a text that cannot be a path does not."""
    try:
        return Path(place).exists()
    except (OSError, ValueError):
        return False


def new_places(given: list[str]) -> dict[str, str]:
    """The new places of a merge's inputs: name -> place.

    given: NAME=PLACE each
    Raises UserError where the name is missing.
    """
    for place in given:
        if "=" not in place:
            raise UserError(f"--experts {place} names no expert; write NAME={place}")
    return dict(place.split("=", 1) for place in given)


def _pieces(text: str) -> list[str]:
    """Split a text at each +, unless the + belongs to the name of a file that exists."""
    parts, pieces = text.split("+"), []
    while parts:
        ends = range(len(parts), 0, -1)
        joined = ("+".join(parts[:end]) for end in ends)
        there = (exists(piece) or exists(re.sub(r"\*[^*+]*$", "", piece)) for piece in joined)
        end = next((end for end, found in zip(ends, there, strict=True) if found), 1)
        pieces.append("+".join(parts[:end]))
        parts = parts[end:]
    return pieces


def _lora(text: str) -> Lora:
    path, star, strength = text.rpartition("*")
    if not star or exists(text):
        return Lora(text)
    try:
        number = float(strength)
    except ValueError:
        raise UserError(
            f"the strength '{strength}' of LoRA {path} is no number; write e.g. +{path}*0.8"
        ) from None
    return Lora(path, number)


def _default_name(source: str) -> str:
    """The name of a folder or file, without its suffix and characters that a name cannot have."""
    name = given_name(Path(source)).removesuffix(".safetensors").removesuffix(".gguf")
    return plain_name(name, "expert")
