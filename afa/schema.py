"""Check data from JSON or TOML against type hints: -> the object, or an error that names file and key.

Supported hints: dataclasses, TypedDict (which allows other keys besides its own), list, tuple, dict, Literal,
unions, Any, and Annotated with `Within`, `Like` or any other object that has `expected` (a text) and
`fits(value)`.
"""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from afa.errors import UserError

LONGEST = 100_000  # characters of one text; a caption is never longer
DEEPEST = 50  # lists and objects inside each other, where a hint allows anything
INTEGERS = 2**64  # seeds need all of them
KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
EXPECTED = KINDS | {int: "a whole number"}


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of the length of a text or list; both bounds are included.

    least: the smallest value
    most:  the largest value
    """

    least: float = -math.inf
    most: float = math.inf

    @property
    def expected(self) -> str:
        if self.least == -math.inf:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}" if self.most == math.inf else f"{self.least:g} to {self.most:g}"

    def fits(self, value: Any) -> bool:
        return self.least <= (len(value) if isinstance(value, (str, list)) else value) <= self.most


@dataclass(frozen=True)
class Like:
    """A text that matches a pattern as a whole.

    pattern:  a regular expression
    expected: the pattern in words
    """

    pattern: str
    expected: str

    def fits(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value) is not None


class AnyFloat:
    """A float that need not be finite: a score is NaN if it could not be computed."""

    expected = "a number"

    def fits(self, value: Any) -> bool:
        return True


Sha256 = Annotated[str, Like("[0-9a-f]{64}", "64 hexadecimal digits")]
Count = Annotated[int, Within(0)]
Score = Annotated[float, AnyFloat()]


class Misfit(Exception):  # noqa: N818 - never leaves this file
    """A value does not fit its hint.

    key:      the place in the file
    value:    what was found there
    expected: what should be there, in words
    sentence: the whole message instead, if that says more
    """

    def __init__(self, key: str, value: Any, expected: str, sentence: str = "") -> None:
        self.key, self.value, self.expected, self.sentence = key, value, expected, sentence


def build(hint: Any, value: Any, where: object, key: str = "") -> Any:
    """Make what a type hint describes from a value that was read from a file.

    hint:  a type hint, see above
    value: from JSON or TOML
    where: the file, for messages
    key:   the place in the file, for messages
    Returns the object.
    Raises UserError with one sentence: file, key, what was found, what was expected.
    """
    try:
        return _build(hint, value, key, ())
    except Misfit as found:
        at = f" {found.key}" if found.key else ""
        why = found.sentence or f"is {shown(found.value)}{_kind(found.value)}, expected {found.expected}"
        raise UserError(f"{where}:{at} {why}") from None


def shown(value: Any) -> str:
    """A value of a file on one line: at most 80 characters, without control characters."""
    if isinstance(value, (list, dict)):
        return f"{len(value)} values" if isinstance(value, list) else f"{len(value)} keys"
    large = isinstance(value, int) and abs(value) >= INTEGERS
    text = "beyond 64 bits" if large else json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _kind(value: Any) -> str:
    """The type of a value in words, in brackets; empty where the value itself shows it."""
    if value is None or isinstance(value, bool):
        return ""
    return f" ({KINDS.get(type(value), type(value).__name__)})"


def _build(hint: Any, value: Any, key: str, limits: Sequence[Any]) -> Any:
    """The value as the hint wants it. limits: the objects beside the hint in an Annotated."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Required, typing.NotRequired):
        return _build(arguments[0], value, key, limits)
    if origin is Annotated:
        return _build(arguments[0], value, key, (*limits, *arguments[1:]))
    if origin in (types.UnionType, typing.Union):
        return _union(arguments, value, key, limits)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, key)
    if typing.is_typeddict(hint):
        return _typed(hint, value, key)
    if origin in (list, tuple, Sequence):
        built = [
            _build(arguments[0], part, f"{key}[{place}]", ())
            for place, part in enumerate(_as(list, value, key))
        ]
        _limited(value, key, limits)
        return tuple(built) if origin is tuple else built
    if origin is dict:
        return {
            _text(name, key): _build(arguments[1], part, _inner(key, name), ())
            for name, part in _as(dict, value, key).items()
        }
    if origin is typing.Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise Misfit(key, value, " or ".join(shown(known) for known in arguments))
        return value
    if hint is Any:
        return _anything(value, key, 0)
    value = _as(hint, value, key, any(isinstance(limit, AnyFloat) for limit in limits))
    if value is not None:
        _limited(value, key, limits)
    return value


def _as(kind: type, value: Any, key: str, infinite: bool = False) -> Any:
    """A plain value of a type: true is no number, 3.0 no whole number, infinity no float."""
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    fits = fits and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise Misfit(key, value, EXPECTED.get(kind, kind.__name__))
    if kind in (int, float) and isinstance(value, int) and abs(value) >= INTEGERS:
        raise Misfit(key, value, f"{EXPECTED[kind]} of at most 64 bits")
    if kind is float and not infinite and not math.isfinite(value):
        raise Misfit(key, value, "a finite number")
    if kind is str:
        _text(value, key)
    return float(value) if kind is float else value


def _text(value: str, key: str) -> str:
    """The text, if every reader can take it. Raises Misfit."""
    if len(value) > LONGEST or "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Misfit(
            key, value, f"text of at most {LONGEST} characters, without NUL and halves of characters"
        )
    return value


def _limited(value: Any, key: str, limits: Sequence[Any]) -> None:
    for limit in limits:
        if not limit.fits(value):
            raise Misfit(key, value, limit.expected)


def _union(hints: Sequence[Any], value: Any, key: str, limits: Sequence[Any]) -> Any:
    """The value by the first hint that fits. If none fits, the misfit deepest inside the value is raised."""
    missed: list[Misfit] = []
    for hint in hints:
        try:
            return _build(hint, value, key, limits)
        except Misfit as misfit:
            missed.append(misfit)
    deepest = max(missed, key=lambda misfit: len(misfit.key))
    if deepest.key != key or deepest.sentence:
        raise deepest
    raise Misfit(key, value, " or ".join(misfit.expected for misfit in missed))


def _dataclass(kind: type, value: Any, key: str) -> Any:
    """A dataclass made from the keys of an object. Raises Misfit for an unknown or a missing key."""
    hints = hints_of(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    _as(dict, value, key)
    for name in value:
        if name not in fields:
            raise Misfit(
                key, value, "", f"has a key that is not known: {shown(name)}; known are {', '.join(fields)}"
            )
    built = {}
    for name, field in fields.items():
        if name in value:
            built[name] = _build(hints[name], value[name], _inner(key, name), ())
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Misfit(_inner(key, name), None, "", "is missing")
    return kind(**built)


def _typed(kind: Any, value: Any, key: str) -> dict[str, Any]:
    """A TypedDict: its own keys by their hints, other keys with any value."""
    hints = hints_of(kind)
    _as(dict, value, key)
    missing = sorted(kind.__required_keys__ - value.keys())
    if missing:
        raise Misfit(_inner(key, missing[0]), None, "", "is missing")
    return {
        _text(name, key): _build(hints.get(name, Any), part, _inner(key, name), ())
        for name, part in value.items()
    }


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The type hints of a class or function, together with Annotated's other arguments."""
    return typing.get_type_hints(kind, include_extras=True)


def _anything(value: Any, key: str, depth: int) -> Any:
    """Any value of JSON that is not nested too deeply and has only texts that can be read."""
    if depth > DEEPEST:
        raise Misfit(key, value, f"at most {DEEPEST} lists and objects inside each other")
    if isinstance(value, dict):
        return {
            _text(name, key): _anything(part, _inner(key, name), depth + 1) for name, part in value.items()
        }
    if isinstance(value, list):
        return [_anything(part, f"{key}[{place}]", depth + 1) for place, part in enumerate(value)]
    return value if value is None else _as(type(value), value, key, infinite=True)


def _inner(key: str, name: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][\w-]*", name)
    return (f"{key}.{name}" if key else name) if plain else f"{key}[{shown(name)}]"
