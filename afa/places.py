"""Names and places: short names such as demo:curves, names for files, and places that may be published."""

import re
from pathlib import Path, PurePath
from typing import Any

from afa.errors import UserError, unknown
from afa.schema import shown

ASSETS = Path(__file__).parent / "demo" / "assets"
FAR_MODELS = ("curves", "angles", "patterns", "base", "ensemble")
NEAR_MODELS = ("near-round", "near-sharp", "near-signs", "near-base")
EMBEDDED = (*FAR_MODELS, *NEAR_MODELS)
SPELLING = re.compile(r"(?P<name>(?:[A-Za-z0-9][\w.-]*=)?)demo:(?P<model>[\w.-]*)(?P<rest>.*)", re.DOTALL)


def located(text: str) -> str:
    """Replace demo:MODEL by the folder of that embedded model; any other text stays as it is.

    text: a place, also as part of an expert: NAME=demo:MODEL+style.safetensors. A file or folder of that name
          is preferred.
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
    # an embedded ensemble names its experts by the way from its own folder
    return re.sub(rf"{re.escape(str(ASSETS))}/([\w-]+/\.\./)?", "demo:", sentence)


def spelled(path: Path) -> str | None:
    """The short name of an embedded model's folder; None for any other folder."""
    path = path.resolve()
    return f"demo:{path.name}" if path.parent == ASSETS.resolve() and path.name in EMBEDDED else None


LONGEST_NAME = 100
# Names that Windows reserves, with any ending.
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
FORBIDDEN = re.compile(r'[/\\:*?"<>|]')


def check_name(name: object, what: str) -> str:
    """Check that a name can be the name of a file on every system.

    name: what was given
    what: what it names, for the message: "an expert"
    Returns the name.
    Raises UserError.
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
    """Make a file name of any text; `otherwise` if no character of the text can be used."""
    kept = "".join(letter if letter.isprintable() and not FORBIDDEN.match(letter) else "-" for letter in text)
    kept = kept.strip(" .")[:LONGEST_NAME].rstrip(" .")
    return f"_{kept[1:]}" if RESERVED.fullmatch(kept) else kept or otherwise


def _reason(name: object) -> str:
    """Why a name cannot name a file; empty if it can."""
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
REPOSITORY = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
LINKING = {"](": "]\\(", "![": "!\\[", "][": "]\\[", "]:": "]\\:"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # begins a formula in spreadsheets


def markdown_words(text: Any) -> str:
    """A text on one line, with everything escaped that Markdown would read as markup."""
    words = " ".join(str(text).split())
    for sign in "\\`*_|<>":
        words = words.replace(sign, "\\" + sign)
    for link, plain in LINKING.items():
        words = words.replace(link, plain)
    begins_block = re.match(r"[#+~=-]|\d+[.)] ", words) and not re.match(r"[-+]?[\d.]", words)
    return f"\\{words}" if begins_block else words


def csv_cell(value: Any) -> Any:
    """A value for CSV: a text that a spreadsheet would compute gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def on_hub(place: str) -> tuple[str, str | None] | None:
    """The repository and revision that a place names: org/name@revision; None for any other place.

    What exists here is never taken for a repository.
    """
    found = REPOSITORY.fullmatch(place)
    return None if found is None or Path(place).exists() else (found["name"], found["revision"])


def snapshot_id(folder: Path) -> str | None:
    """The org/name@commit of a folder in the hub's cache; None for any other folder.

    folder: …/models--org--name/snapshots/commit
    """
    parts = Path.cwd().joinpath(folder).parts[-3:]  # not resolved: the hub's cache is made of links
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    found = f"{parts[0].removeprefix('models--').replace('--', '/')}@{parts[2]}"
    return found if REPOSITORY.fullmatch(found) else None


def public_place(place: Any) -> Any:
    """Remove folders of this machine from a place, so that it may be published.

    place: a text, such as NAME=PLACE+LORA*0.5, or a list of them; other values stay as they are
    Returns hub ids and demo:NAME unchanged, and only the last name of every path.
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
    known = snapshot_id(Path(rest)) or spelled(Path(rest))
    return f"{name}{equals}{known or PurePath(plain).name or rest}"
