"""The one reader of text: files of prompts, captions, lines and JSON are decoded and parsed here.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. All else is refused by name,
since a guessed encoding puts wrong letters into prompts without a word.
"""

import codecs
import json
import math
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afa.errors import UserError

LARGEST = 2**30  # bytes of a file of text
DEEPEST = 64  # lists and objects inside one another, in JSON
# UTF-32 before UTF-16, whose mark it begins with
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines also cuts at form feeds, U+0085 and U+2028
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters that UTF-16 writes as two
ESCAPED = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")  # the same, as JSON can hold them


class TextError(UserError):
    """Text that cannot be used: which, where, why, and what to do, in one sentence."""


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a file, without its byte order mark.

    path:    a plain file, or a link to one; devices and pipes are never opened
    largest: size that is still read, in bytes
    Raises TextError for what is no text, OSError for a file that cannot be opened.
    """
    return decode_text(read_bytes(path, largest), str(path))


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a plain file of at most so many bytes. Raises TextError for anything else."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise TextError(f"{path} is no plain file; give a file")
    if facts.st_size > largest:
        raise TextError(f"{path} has {facts.st_size:,} bytes, and at most {largest:,} are read; split it")
    return path.read_bytes()


def decode_text(data: bytes, name: str) -> str:
    """Bytes as text, without the byte order mark. name: what to call them in an error. Raises TextError."""
    mark, encoding = next((pair for pair in MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        line = f", line {data.count(10, 0, place) + 1}" if encoding == "utf-8" else ""
        raise TextError(
            f"{name} is not {encoding.upper()} text (byte {place}{line}: 0x{data[place]:02x}); convert it, "
            f"for example: iconv -f windows-1252 -t utf-8 OLD > NEW"
        ) from None
    return check_text(text, name)


def check_text(text: str, name: str) -> str:
    """The text as it is. name: where it is from. Raises TextError for NUL or half a surrogate pair in it."""
    found = NO_TEXT.search(text)
    if found is None:
        return text
    code = ord(found.group())
    what = f"half a surrogate pair (U+{code:04X})" if code else "a NUL character"
    raise TextError(f"{name} holds {what} at character {found.start()}, which is no text; remove it")


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, which end at \n, \r\n or \r only; no empty one after the last line end."""
    lines = LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def clean(text: str) -> str:
    """Without blanks, and byte order marks that joined files left, around it."""
    return text.strip().strip("\ufeff").strip()


def parse_json(text: str, name: str, nan: bool = False) -> Any:
    """What JSON holds. name: what to call it in an error. nan: whether NaN may stand for a number.

    Raises TextError for what is no JSON, NaN and infinite numbers, a key that an object has twice, nesting
    deeper than DEEPEST, and strings that are no text.
    """
    try:
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_may_be_nan if nan else _no_number,
            parse_float=_finite,
        )
    except RecursionError:
        raise TextError(f"{name} is nested deeper than {DEEPEST} levels; it is no file of ours") from None
    except ValueError as error:
        raise TextError(f"{name} is not JSON: {error}") from None
    suspicious, level = ESCAPED.search(text) is not None, [found]
    for _ in range(DEEPEST + 1):
        for value in level if suspicious else ():
            for string in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
                check_text(string, name)
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return found
    raise TextError(f"{name} is nested deeper than {DEEPEST} levels; it is no file of ours")


def read_json(path: Path, largest: int = LARGEST, nan: bool = False) -> Any:
    """What a JSON file holds. nan: see parse_json. Raises TextError, or OSError if it cannot be opened."""
    return parse_json(read_text(path, largest), str(path), nan)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises TextError for what is none, OSError for a file that cannot be opened."""
    try:
        return tomllib.loads(read_text(path))
    except RecursionError:
        raise TextError(f"{path} is nested deeper than can be read; it is no file of ours") from None
    except ValueError as error:
        raise error if isinstance(error, TextError) else TextError(f"{path} is not TOML: {error}") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Of each line that is not blank: its place in words ("FILE, line 3"), what it holds."""
    for number, line in enumerate(split_lines(read_text(path)), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return found


def _may_be_nan(constant: str) -> float:
    return float(constant) if constant == "NaN" else _no_number(constant)


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number there")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number
