"""Names and places: short names such as demo:curves, names of files, places that may be published."""

import re
from pathlib import Path, PurePath
from typing import Any

from afa.errors import UserError, unknown
from afa.schema import shown

ASSETS = Path(__file__).parent / "demo" / "assets"
EMBEDDED = ("curves", "angles", "patterns", "base", "ensemble")
SPELLING = re.compile(r"(?P<name>(?:[A-Za-z0-9][\w.-]*=)?)demo:(?P<model>[\w.-]*)(?P<rest>.*)", re.DOTALL)


def located(text: str) -> str:
    """A place with the folder of an embedded model for its spelling; any other text as it is.

    text: demo:MODEL, also as part of an expert: NAME=demo:MODEL+style.safetensors. What exists under that
    name goes first.
    Raises UserError for a model that is not embedded.
    """
    found = SPELLING.fullmatch(text)
    if found is None or Path(text).exists():
        return text
    if found["model"] not in EMBEDDED:
        raise UserError(
            unknown(f"demo:{found['model']}", [f"demo:{name}" for name in EMBEDDED], "embedded model")
        )
    return f"{found['name']}{ASSETS / found['model']}{found['rest']}"


def as_typed(sentence: str) -> str:
    """Replace folders of embedded models in a sentence by their short names, such as demo:curves/unet."""
    return sentence.replace(f"{ASSETS}/", "demo:")


def spelled(path: Path) -> str | None:
    """The spelling of an embedded model's folder; None for any other."""
    path = path.resolve()
    return f"demo:{path.name}" if path.parent == ASSETS.resolve() and path.name in EMBEDDED else None


LONGEST_NAME = 100
RESERVED = re.compile(
    r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE
)  # of Windows, with any ending
FORBIDDEN = re.compile(r'[/\\:*?"<>|]')


def check_name(name: object, what: str) -> str:
    """A name as it is, if it can be a file's name everywhere.

    what: whose it is, for the message: "an expert". Raises UserError.
    """
    reason = _reason(name)
    if reason:
        raise UserError(
            f"{what} is called {shown(name)}: a name {reason}; use up to {LONGEST_NAME} letters, "
            "digits and ' ._-+' instead"
        )
    assert isinstance(name, str)
    return name


def plain_name(text: str, otherwise: str) -> str:
    """A name made of any text, such as a file's name; `otherwise` where nothing of it can be used."""
    kept = "".join(letter if letter.isprintable() and not FORBIDDEN.match(letter) else "-" for letter in text)
    kept = kept.strip(" .")[:LONGEST_NAME].rstrip(" .")
    return f"_{kept[1:]}" if RESERVED.fullmatch(kept) else kept or otherwise


def _reason(name: object) -> str:
    """Why a name is not plain; empty if it is."""
    if not isinstance(name, str):
        return "is text"
    if not name.strip():
        return "must not be empty"
    if len(name) > LONGEST_NAME:
        return f"has at most {LONGEST_NAME} characters"
    found = FORBIDDEN.search(name)
    if found:
        return f"must not have {found[0]} in it, since files are named after it"
    if not name.isprintable():
        return "must not have control characters in it"
    if name.startswith((".", " ")) or name.endswith((".", " ")):
        return "must not begin with a dot or end with one, or with a space"
    return "must not be one that a system reserves" if RESERVED.fullmatch(name) else ""


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w./-]+\.safetensors)?(@[\w./-]+)?")
LINKING = {"](": "]\\(", "![": "!\\[", "][": "]\\[", "]:": "]\\:"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # begins a formula in spreadsheets


def markdown_words(text: Any) -> str:
    """Words that could be taken for Markdown, HTML, a link or a picture, as words on one line."""
    words = " ".join(str(text).split())
    for sign in "\\`*_|<>":
        words = words.replace(sign, "\\" + sign)
    for link, plain in LINKING.items():
        words = words.replace(link, plain)
    return (
        f"\\{words}" if re.match(r"[#+~=-]|\d+[.)] ", words) and not re.match(r"[-+]?[\d.]", words) else words
    )


def csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would compute, as text; numbers as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def public_place(place: Any) -> Any:
    """Remove folders of this machine from a place: hub ids and demo:NAME stay, of others the last name stays.

    place: a text, such as NAME=PLACE+LORA*0.5, or a list of them.
    """
    if isinstance(place, (list, tuple)):
        return [public_place(one) for one in place]
    return "+".join(_public(piece) for piece in place.split("+")) if isinstance(place, str) else place


def _public(piece: str) -> str:
    name, equals, rest = piece.partition("=") if re.match(r"[\w.-]+=", piece) else ("", "", piece)
    plain = rest.replace("\\", "/")
    outside = plain.startswith(("/", ".", "~")) or ":" in plain[:3] or ".." in plain.split("/")
    if not outside and HUB_ID.fullmatch(rest) and not Path(rest).exists():
        return piece
    return f"{name}{equals}{spelled(Path(rest)) or PurePath(plain).name or rest}"
