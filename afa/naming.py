"""Names that become names of files and folders: which are plain, in one place for all commands, manifests and the Python API."""

import re

from afa.errors import UserError
from afa.schema import shown

LONGEST_NAME = 100
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # of Windows, with any ending
FORBIDDEN = re.compile(r'[/\\:*?"<>|]')


def check_name(name: object, what: str) -> str:
    """A name as it is, if it can be a file's name everywhere. what: whose it is, for the message: "an expert". Raises UserError."""
    reason = _reason(name)
    if reason:
        raise UserError(f"{what} is called {shown(name)}: a name {reason}; use up to {LONGEST_NAME} letters, digits and ' ._-+' instead")
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
