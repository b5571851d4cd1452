"""What goes into files that are shared: words that stay words in Markdown and CSV, and places without this machine's folders."""

import re
from pathlib import Path, PurePath
from typing import Any

from afa.places import spelled

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
    return f"\\{words}" if re.match(r"[#+~=-]|\d+[.)] ", words) and not re.match(r"[-+]?[\d.]", words) else words


def csv_cell(value: Any) -> Any:
    """A text that a spreadsheet would compute, as text; numbers as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def public_place(place: Any) -> Any:
    """Where something comes from without folders of this machine: a hub id and demo:NAME as they are, else its last name.

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
