"""Settings with a flag for every option of the aggregators. No heavy imports: help comes from here."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from afa import defaults
from afa.aggregators.registry import AGGREGATORS
from afa.errors import UserError, unknown
from afa.schema import hints_of
from afa.settings import CheckedOptions

ATTENTION_HELP = (
    "build the transformer only on maps up to this side in latent pixels; 65536: everywhere "
    f"(default: {defaults.SMALL_SIDE}, or the largest map on which the experts attend)"
)
OptionField = tuple[Any, "dataclasses.Field[Any]"]  # its type and itself


def option_fields(kinds: Mapping[str, Any]) -> dict[str, OptionField]:
    """Return one field for each option of these aggregators; None if it is not given and has no default.

    What is chosen by the experts' size (see AggregatorOptions.by_size) has no default either.

    kinds: aggregator's name -> the dataclass of its options
    Raises ValueError if an option that several share is not declared alike: it is one flag.
    """
    owners: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for kind, options in kinds.items():
        for field in dataclasses.fields(options):
            owners.setdefault(field.name, {})[kind] = field
    found: dict[str, OptionField] = {}
    for name, declared in owners.items():
        first, field = next(iter(declared.items()))
        for kind, other in declared.items():
            if (other.type, other.default, other.metadata) != (field.type, field.default, field.metadata):
                raise ValueError(f"aggregators '{first}' and '{kind}' differ in option '{name}'; rename one")
        of = "" if len(declared) == len(kinds) else f"of {', '.join(declared)}: "
        sized = any(name in kinds[kind].by_size(1, {}) for kind in declared)
        default: Any = None if sized or field.default is dataclasses.MISSING else field.default
        hint = hints_of(kinds[first])[name]
        words = f"{of}{field.metadata['help']}{' (default: by the size of the experts)' if sized else ''}"
        metadata = {**field.metadata, "help": words}
        flag: dataclasses.Field[Any] = dataclasses.field(default=default, metadata=metadata)
        found[name] = (hint | None if default is None else hint, flag)
    return found


class AggregatorSettings(CheckedOptions):
    """Base of a command's settings that name an aggregator, with a field for each option of an aggregator.

    The fields are made from AGGREGATORS: those that are registered when the class is made, and in current()
    those that were registered since.
    trained_only: whether only aggregators that can be trained may be chosen
    """

    aggregator: str | None
    trained_only: ClassVar[bool] = False

    @classmethod
    def option_fields(cls) -> dict[str, OptionField]:
        """Return the fields of the options of all aggregators that may be chosen."""
        return option_fields(
            {
                kind: entry.options
                for kind, entry in AGGREGATORS.items()
                if entry.trained or not cls.trained_only
            }
        )

    @classmethod
    def sized_options(cls) -> tuple[str, ...]:
        """Return the names of the options that are chosen by the experts' size where they are not given."""
        sized = {name for entry in AGGREGATORS.values() for name in entry.options.by_size(1, {})}
        return tuple(name for name in cls.option_fields() if name in sized)

    @classmethod
    def current(cls) -> type[Self]:
        """Return this class, or one that also has the fields of aggregators that were registered later."""
        settings: Any = cls
        known = {field.name for field in dataclasses.fields(settings)}
        names = tuple(cls.option_fields())
        return settings if known.issuperset(names) else _extended(settings, names)

    def aggregator_options(self) -> dict[str, Any]:
        """Return the options of the chosen aggregator that have a value.

        Raises UserError for an aggregator that does not exist, and for an option that it does not have.
        """
        kind = self.aggregator or defaults.AGGREGATOR
        if kind not in AGGREGATORS:
            raise UserError(unknown(kind, AGGREGATORS, "aggregator"))
        known = [field.name for field in dataclasses.fields(AGGREGATORS[kind].options)]
        flags = self.option_fields()
        values = {name: getattr(self, name) for name in flags if hasattr(self, name)}
        for name, value in values.items():
            if name not in known and value != flags[name][1].default:
                shown = " ".join(map(str, value)) if isinstance(value, list) else value
                has = f"it has {', '.join(known)}" if known else "it has no options"
                raise UserError(
                    f"--{name.replace('_', '-')} {shown} is no option of --aggregator {kind}; {has}"
                )
        return {name: value for name, value in values.items() if name in known and value is not None}

    def other_aggregator(self, kind: str) -> dict[str, Any]:
        """Return the changes that choose another aggregator and reset the options that it does not have."""
        known = {field.name for field in dataclasses.fields(AGGREGATORS[kind].options)}
        reset = {
            name: field.default for name, (_, field) in self.option_fields().items() if name not in known
        }
        return {"aggregator": kind, **reset}


@functools.cache
def _extended(settings: Any, names: tuple[str, ...]) -> Any:
    """Return a subclass of a dataclass of settings, with a field for each option of an aggregator.

    names: of the options; one class is made for each set of them, so that its instances can be compared
    """
    fields = settings.option_fields()
    annotations = {name: hint for name, (hint, _) in fields.items()}
    body = {"__annotations__": annotations, "__module__": settings.__module__, "__doc__": settings.__doc__}
    made = type(settings.__name__, (settings,), body | {name: field for name, (_, field) in fields.items()})
    return dataclasses.dataclass(frozen=True, kw_only=True)(made)


def with_aggregator_options(settings: Any) -> Any:
    """Add a field for each option of an aggregator to a dataclass of settings: a class decorator."""
    return settings.current()
