"""The registry of merges. No heavy imports: the command line, comparisons, the search and docs read it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from afa.errors import UserError, look_up, unknown
from afa.merging import block_weights, rules
from afa.merging.rules import Merge
from afa.settings import check_value, kind_of

MERGES: dict[str, Merge] = {
    "weighted": rules.WEIGHTED,
    "mbw": block_weights.MBW,
    "add_difference": rules.ADD_DIFFERENCE,
    "task_arithmetic": rules.TASK_ARITHMETIC,
    "ties": rules.TIES,
    "dare": rules.DARE,
    "model_stock": rules.MODEL_STOCK,
    "slerp": rules.SLERP,
}


def find_merge(method: str) -> Merge:
    """A merge by its name. Raises UserError with the nearest names."""
    try:
        return look_up(method, MERGES, "merge")
    except ValueError as error:
        raise UserError(str(error)) from None


def check_merge(method: str, experts: int, base: bool, options: Mapping[str, Any]) -> None:
    """Refuse, in one sentence, what does not belong together. Raises UserError.

    experts: how many there are, the base not among them
    base:    whether one was given
    options: the merge's own, as they were given
    """
    merge = find_merge(method)
    fields = {field.name: field for field in dataclasses.fields(merge.options)}
    for name in options:
        if name not in fields:
            hint = f"{method}: {unknown(name, fields, 'option')}"
            raise UserError(hint if fields else f"{method} has no options, so it cannot take '{name}'")
    if experts < 1:
        raise UserError("a merge needs at least one expert")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in options:
            raise UserError(f"{method} needs {name}")
    if merge.needs("base") and not base:
        tuned = "give the model that they were tuned from as base (--base)"
        raise UserError(f"{method} adds what experts learnt to their base; {tuned}")
    if base and not merge.needs("base"):
        raise UserError(f"{method} takes no base; leave it out, or give it as one of the experts")
    if merge.experts is not None and experts != merge.experts:
        other = "for other numbers there are weighted and task_arithmetic"
        raise UserError(f"{method} is of exactly {merge.experts} experts, and {experts} were given; {other}")
    for name, value in options.items():
        check_value(merge.options, fields[name], value, f"{method}: {name}")
    if not merge.by_stage:  # whose weights are checked where the stages are known
        merge.filled(options, experts, ())


def flag_help(name: str) -> str:
    """What the flag of an option says: whose option it is, what it does, its defaults."""
    found = [
        (method, field)
        for method, merge in MERGES.items()
        for field in dataclasses.fields(merge.options)
        if field.name == name
    ]
    (_, first), usual = found[0], found[0][1].default
    others = [f"; {method}: {field.default:g}" for method, field in found if field.default != usual]
    default = f" (default: {usual:g}{''.join(others)})" if isinstance(usual, (int, float)) else ""
    return f"{', '.join(method for method, _ in found)}: {first.metadata['help']}{default}"


def read_options(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """A merge's options from KEY=VALUE; lists are written with commas.

    Raises UserError for what cannot be understood.
    """
    fields = {field.name: field for field in dataclasses.fields(find_merge(method).options)}
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in fields or name in given:
            reason = (
                "is given twice" if name in given else f": {unknown(name, fields, f'option of {method},')}"
            )
            raise UserError(f"--method-option {text} {reason if equals else 'has no value; write KEY=VALUE'}")
        kind, several = kind_of(fields[name].type)
        try:
            values = [kind(part) for part in (value.split(",") if several else [value])]
        except (TypeError, ValueError):
            raise UserError(
                f"--method-option {text}: {value} is no {getattr(kind, '__name__', 'value')}"
            ) from None
        given[name] = values if several else values[0]
    return given
