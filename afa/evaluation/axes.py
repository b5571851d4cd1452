"""Settings of sampling with several values: of these each method has its own, and some are drawn at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afa.errors import UserError
from afa.evaluation.rows import MethodRow, in_words
from afa.evaluation.settings import AXES, EvaluateSettings
from afa.sampling.sample import Sampling


@dataclass(frozen=True)
class Axis:
    """A setting of sampling to which the user gave several values.

    name:   one of settings.AXES
    values: ascending
    start:  the value with which options are chosen; methods keep it if there is nothing to choose by
    begun:  what the output folder notes of it: the start, or None if that is the protocol's own
    """

    name: str
    values: tuple[float, ...]
    start: float
    begun: float | None

    def of(self, row: MethodRow) -> list[float]:
        """Return the values that a row can use, the start first."""
        values = sorted(self.values, key=lambda value: (value != self.start, value))
        if self.name == "guidance" and row.guided:
            values = [value for value in values if value > 1] or values
        return values


def find_axes(settings: EvaluateSettings, sampling: Sampling, begun: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return the settings that have several values.

    sampling: the protocol's own
    begun:    what the output folder was begun with; empty if nothing was made there yet
    The start is what the folder was begun with; in a new folder the protocol's own value if that is among
    the values, else the middle one. So values can be added to a folder, and taken away again, and a folder
    of one value can get more. Raises UserError if the values lack what the folder was begun with.
    """
    axes = []
    for name in AXES:
        values = tuple(settings.several(name))
        if not values:
            continue
        own = getattr(sampling, name)
        if name in begun:
            noted = begun[name]
            start = own if noted is None else noted
            if start not in values:
                _refuse(settings, name, start, values)
        else:
            start = noted = own if own in values else values[(len(values) - 1) // 2]
        axes.append(Axis(name, values, start, noted))
    return tuple(axes)


def _refuse(settings: EvaluateSettings, name: str, start: Any, values: Sequence[float]) -> None:
    now = " ".join(f"{value:.16g}" for value in values)
    raise UserError(
        f"the comparison in {settings.output} was begun with {in_words(name, start)}, which is not among"
        f" --{name} {now}; add it, or choose another --output"
    )
