"""A user's mistake as one clear sentence, and lookups that suggest the nearest name."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar


class UserError(ValueError):
    """A request that cannot be done as asked. The message names the thing, both values, and what to do."""


T = TypeVar("T")


def look_up(name: str, table: Mapping[str, T], what: str) -> T:
    """The entry of a table by its name.

    name:  what was asked for
    table: name -> entry
    what:  what an entry is, for the message
    Raises ValueError with the nearest name and all known names.
    """
    if name not in table:
        raise ValueError(unknown(name, table, what))
    return table[name]


def unknown(name: str, names: Iterable[str], what: str) -> str:
    """The sentence for a name that is not known, with the nearest name and all known names."""
    names = list(names)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    meant = f"; did you mean '{near[0]}'?" if near else "."
    return f"there is no {what} '{name}'{meant} Known: {', '.join(names)}"
